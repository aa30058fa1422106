"""The trained demo model that ships with the suite: small, loadable by plain diffusers, drawing what captions say in a style that is not ink."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli.demo_settings import ASSETS
from demo import painting, score, small, world

ROWS = score.held_out(32)


def test_the_repository_stays_small():
    sizes = {
        part.name: sum(file.stat().st_size for file in [part, *part.rglob("*")] if file.is_file()) / 1e6
        for part in ASSETS.iterdir()
    }
    assert sizes["model"] < 25 and sizes["clip"] < 5 and sum(sizes.values()) < 30


@pytest.fixture(scope="module")
def held_out():
    """The held-out ink drawings, uint8 [32, 3, 128, 128]."""
    return torch.stack(
        [
            torch.from_numpy(np.array(Image.open(ASSETS / "held_out" / row["file_name"]))).permute(2, 0, 1)
            for row in ROWS
        ]
    )


def test_what_is_drawn_on_disk_is_what_the_world_draws(held_out):
    """Within rounding: the files were made on another CPU."""
    drawn = painting.render(world.draw_attributes(32, 999), 999, "ink", 128)
    assert (held_out.int() - drawn.int()).abs().max() <= 1


def test_training_and_held_out_drawings_differ():
    rows = [json.loads(line) for line in (ASSETS / "data" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 100 and not {row["text"] for row in rows} & {row["text"] for row in ROWS}


def test_the_judge_reads_both_styles(held_out):
    judge, labels = small.load_judge(ASSETS / "judge.safetensors"), world.draw_attributes(32, 999)
    for style, pictures in (("ink", held_out), ("plain", painting.render(labels, 5, "plain", 128))):
        read = judge.read(pictures)
        assert (read[:, -1] == world.STYLES.index(style)).float().mean() >= 31 / 32
        assert (read[:, :-1] == labels).float().mean() > 0.97


def test_the_clip_score_knows_whose_caption_it_is(held_out):
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in held_out[:16]]
    captions = [row["text"] for row in ROWS[:16]]
    own, other = small.clip_scores(pictures, captions), small.clip_scores(pictures, captions[1:] + captions[:1])
    assert min(own) > 70 and sum(own) > 1.5 * sum(other)


def test_plain_diffusers_draws_what_the_caption_says_in_the_plain_style():
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(ASSETS / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        [row["text"] for row in ROWS[:4]], num_inference_steps=12, guidance_scale=5.0, generator=torch.manual_seed(0)
    ).images
    scores = score.score(drawn, ROWS[:4])
    assert scores["style"][0] == 0 and scores["attributes"][0] >= 15 / 16


def test_wilsons_interval():
    """https://www.itl.nist.gov/div898/handbook/prc/section2/prc241.htm: 4 of 20 are [0.081, 0.416]."""
    assert score.share([True] * 4 + [False] * 16)[1] == pytest.approx((0.0807, 0.4160), abs=1e-3)

"""What the demo's adapter has learnt and kept: held-out captions rendered with and without it, read by judge and CLIP.

    python demo/score.py --lora outputs/demo/train_opt --output_dir outputs/demo

Writes report.json, each figure _before and _after with a 95 % interval:
    style_       share judged to be in the ink style
    attributes_  share of hair, eyes, clothing and background that are as the caption says
    clip_        100 x cosine of picture and caption
"""

import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli.command_line import parse
from common.cli.flag_checks import check_model
from common.cli.flag_facts import flag, local_path
from common.cli.model_flags import ModelFlags
from common.cli.running import run
from common.errors import UserError

READ = ("hair", "eyes", "clothing", "background")
TITLES = dict(style="judged to be in the ink style", attributes="attributes as the caption says", clip="CLIP score")


@dataclass
class Flags(ModelFlags):
    """Score an adapter of the demo's model."""

    lora: Optional[str] = flag(None, "the adapter: a run's folder or a .safetensors file", type=local_path)
    images: int = flag(32, "held-out captions to draw, each with and without the adapter; at most 32")
    resolution: int = flag(128, "pixels: side of the square image")
    steps: int = flag(20, "denoising steps")
    guidance_scale: float = flag(5.0, "strength of the prompt")
    seed: int = flag(0, "picture i is drawn with seed + i")
    output_dir: str = flag("outputs/demo", "where report.json goes", type=local_path)


def main(argv: list[str] | None = None) -> dict:
    """Render, read, write report.json; returns what it says."""
    flags = parse(Flags, ["--demo", *(sys.argv[1:] if argv is None else argv)])
    check(flags)
    started_s = time.monotonic()
    rows = held_out(flags.images)

    # Scores without and with the adapter
    scores = {}
    for name, lora in (("before", None), ("after", flags.lora)):
        pictures = render(flags, lora, [row["text"] for row in rows])
        scores |= {f"{key}_{name}": value for key, value in score(pictures, rows).items()}

    # The report
    seconds = training_seconds(Path(flags.lora)) + time.monotonic() - started_s
    report = {key: round(value, 4) for key, (value, _) in scores.items()}
    report |= {"images": len(rows), "seconds": round(seconds, 1)}
    report["intervals_95"] = {key: [round(end, 4) for end in interval] for key, (_, interval) in scores.items()}

    from common import files

    Path(flags.output_dir).mkdir(parents=True, exist_ok=True)
    files.write_json(Path(flags.output_dir) / "report.json", report)
    print(table(report))
    return report


def check(flags) -> None:
    """Refuse what cannot be scored.

    Raises:
        UserError: no adapter, or the trained demo model is not there.
    """
    from common.cli.demo_settings import is_tiny

    if not flags.lora or not Path(flags.lora).exists():
        raise UserError(f"--lora {flags.lora}: no such file or folder; train one with train_opt.py --demo")
    if is_tiny():
        raise UserError(
            "demo/assets: the trained demo model is not there, and a random one has no style to score; "
            "clone the repository"
        )
    if not 2 <= flags.images <= 32:
        raise UserError(f"--images {flags.images}: must be 2 to 32")
    check_model(flags)


def held_out(count: int) -> list[dict]:
    """The first `count` rows of the held-out drawings: file_name, text and the attributes in it."""
    from common.cli.demo_settings import ASSETS

    lines = (ASSETS / "held_out" / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


def of_adapter(lora: str | Path, images: int) -> dict:
    """The scores of an adapter of the demo's model on `images` held-out captions, see `score`."""
    rows = held_out(images)
    return score(render(parse(Flags, ["--demo"]), lora, [row["text"] for row in rows]), rows)


def render(flags, lora: str | Path | None, captions: list[str]) -> list:
    """PIL images of the captions with the adapter `lora`, or with none; picture i starts from the noise of seed + i."""
    from tqdm import tqdm

    from common.adapter_files import reading
    from common.model import device, loading
    from common.render import sampling

    host = device.start(flags.mixed_precision, flags.seed)
    settings = sampling.Settings(flags.resolution, flags.steps, flags.guidance_scale)
    memory, _ = sampling.choose_memory("auto", host, settings, batch_size=1)
    sampler = sampling.Sampler(loading.find_model(flags.pretrained_model_name_or_path), host, "euler", memory)
    active = [(sampler.load(reading.find_adapter(lora)), 1.0)] if lora else []
    sampler.place()
    numbered = enumerate(tqdm(captions, desc="drawing held-out captions", unit="img"))
    return [sampler.render(active, caption, [flags.seed + i], settings)[0] for i, caption in numbered]


def score(pictures: list, rows: list[dict]) -> dict:
    """PIL images of held-out `rows` -> {"style": (value, interval), "attributes": ..., "clip": ...}."""
    import numpy as np
    import torch

    from common.cli.demo_settings import ASSETS
    from demo import small

    # What the judge reads
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    read = small.load_judge(ASSETS / "judge.safetensors").read(pixels)
    named = [{name: small.LABELS[name][value] for name, value in zip(small.LABELS, row.tolist())} for row in read]
    inked = [labels["style"] == "ink" for labels in named]
    right = [labels[name] == row[name] for labels, row in zip(named, rows) for name in READ]

    # What CLIP says
    cosines = small.clip_scores(pictures, [row["text"] for row in rows])
    mean = statistics.fmean(cosines)
    half = 1.96 * statistics.stdev(cosines) / math.sqrt(len(cosines))
    return {"style": share(inked), "attributes": share(right), "clip": (mean, (mean - half, mean + half))}


def share(hits: list[bool]) -> tuple[float, tuple[float, float]]:
    """(share of True, its 95 % interval by Wilson's formula)."""
    n = len(hits)
    z = 1.96
    p = sum(hits) / n
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return p, ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))


def training_seconds(folder: Path) -> float:
    """What the training behind an adapter took until its last step; 0 where metrics.jsonl is not beside it."""
    from common.train import report

    rows = report.read_metrics(folder / "metrics.jsonl")
    return rows[-1]["seconds"] if rows else 0.0


def table(report: dict) -> str:
    """The report for people to read."""
    effort = f"{report['images']} held-out captions, {report['seconds']:.0f} s of training and scoring"
    lines = [f"{effort}; 95 % intervals in brackets"]
    for key, title in TITLES.items():
        cells = []
        for name in ("before", "after"):
            low, high = report["intervals_95"][f"{key}_{name}"]
            cells.append(f"{report[f'{key}_{name}']:.3g} [{low:.3g}, {high:.3g}]")
        lines.append(f"  {title:32} {cells[0]:24} -> {cells[1]}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)

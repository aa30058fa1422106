"""infer.py: its images are those of plain diffusers, columns differ in the adapter and in nothing else, and mistakes cost one line."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image, ImageChops

import infer
from common import files
from common.cli.command_line import parse
from common.cli.demo_settings import TINY_DEMO
from common.errors import UserError
from common.model import device, loading
from common.render import chosen_adapters, columns, grids, sampling

PROMPTS, STEPS = TINY_DEMO["prompts"], 3
PROMPT = PROMPTS[0]
ROUNDING = 1  # of 255: how far a pixel may be from the same arithmetic done in another order, on another CPU or by plain diffusers


@pytest.fixture(scope="module")
def trained(train):
    """The folder of a short training run with EMA."""
    return train("--max_train_steps", 3, "--learning_rate", 1e-2, "--lr_warmup_steps", 0, "--lora_alpha", 16).dir


@pytest.fixture
def draw(tmp_path):
    """draw(*flags): infer.py on the demo -> (manifest, {(column, prompt, seed): image})."""

    def draw(*flags):
        manifest = infer.main(["--demo", "--steps", str(STEPS), "--output_dir", str(tmp_path), *map(str, flags)])
        assert manifest == json.loads((tmp_path / "manifest.json").read_text())
        return manifest, {
            (r["column"], r["prompt"], r["seed"]): Image.open(tmp_path / r["file"]) for r in manifest["images"]
        }

    return draw


@pytest.fixture
def plain(demo):
    """plain(adapter folder or None, ...): the image that plain diffusers draws."""

    def plain(
        adapter=None, prompt=PROMPT, seed=42, kind=StableDiffusionXLPipeline, prepare=lambda pipeline: None, **options
    ):
        pipeline = kind.from_pretrained(demo.model)
        pipeline.set_progress_bar_config(disable=True)
        if adapter:
            pipeline.load_lora_weights(adapter)
        prepare(pipeline)
        size = {} if "image" in options else dict(height=64, width=64)
        options = (
            dict(num_inference_steps=STEPS, guidance_scale=7.5, generator=torch.Generator().manual_seed(seed), **size)
            | options
        )
        return pipeline(prompt, **options).images[0]

    return plain


@pytest.fixture
def sampler(demo, trained):
    sampler = sampling.Sampler(loading.find_model(str(demo.model)), device.start("no"), "euler", "cpu")
    return sampler, [(sampler.load(trained / "pytorch_lora_weights.safetensors"), 1.0)]


def same(image, other):
    return image.tobytes() == other.tobytes()


def furthest(image, other):
    """Largest difference of a pixel, 0 to 255."""
    return max(high for _, high in ImageChops.difference(image, other).getextrema())


# ---------------------------------------------------------------- the same images as plain diffusers


def test_every_column_is_what_plain_diffusers_draws(trained, draw, plain):
    """Though three adapters are loaded, the base's too."""
    manifest, images = draw("--compare", "--lora", trained, trained / "ema_unet", f"{trained}:2")
    base, lora, ema, double = (column["title"] for column in manifest["columns"])
    for prompt in PROMPTS:
        assert furthest(images[base, prompt, 42], plain(None, prompt)) <= ROUNDING
        assert furthest(images[lora, prompt, 42], plain(trained, prompt)) <= ROUNDING
    assert furthest(images[ema, PROMPT, 42], plain(trained / "ema_unet")) <= ROUNDING
    doubled = plain(trained, prepare=lambda pipeline: pipeline.set_adapters("default_0", 2.0))
    assert furthest(images[double, PROMPT, 42], doubled) <= ROUNDING
    for one, other in itertools.combinations((base, lora, ema, double), 2):
        assert furthest(images[one, PROMPT, 42], images[other, PROMPT, 42]) > 3 * ROUNDING, (one, other)


def test_an_adapter_leaves_no_trace_in_what_is_drawn_after_it(sampler):
    sampler, [(name, _)] = sampler
    settings = sampling.Settings(resolution=64, steps=2)
    base, tuned = (sampler.render(active, PROMPT, [1], settings)[0] for active in ([], [(name, 1.0)]))
    sampler.render([(name, 3.0)], PROMPT, [1], settings)
    assert same(base, sampler.render([], PROMPT, [1], settings)[0])
    assert same(tuned, sampler.render([(name, 1.0)], PROMPT, [1], settings)[0]) and not same(base, tuned)


def test_ema_means_the_averaged_weights_of_the_folder(trained, draw, plain):
    _, images = draw("--ema", "--lora", trained, "--prompt", PROMPT)
    assert furthest(next(iter(images.values())), plain(trained / "ema_unet")) <= ROUNDING


def test_without_compare_all_adapters_are_active_together_at_their_scales(trained, draw, plain):
    def both(pipeline):
        pipeline.load_lora_weights(trained / "ema_unet", adapter_name="ema")
        pipeline.set_adapters(["default_0", "ema"], [0.25, 1.0])

    _, images = draw("--lora", f"{trained}:0.5", f"{trained / 'ema_unet'}:2", "--lora_scale", 0.5, "--prompt", PROMPT)
    assert furthest(next(iter(images.values())), plain(trained, prepare=both)) <= ROUNDING


def test_sampler_negative_prompt_and_guidance_are_those_of_plain_diffusers(draw, plain):
    def karras(pipeline):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)

    flags = [
        "--prompt",
        PROMPT,
        "--negative_prompt",
        "the sea",
        "--guidance_scale",
        3,
        "--scheduler",
        "dpmpp_2m_karras",
        "--seed",
        7,
    ]
    _, images = draw(*flags)
    expected = plain(seed=7, negative_prompt="the sea", guidance_scale=3.0, prepare=karras)
    assert furthest(images["base", PROMPT, 7], expected) <= ROUNDING


def test_an_empty_negative_prompt_is_the_unconditional_input_of_training(draw, plain):
    _, images = draw("--prompt", PROMPT, "--negative_prompt", "")
    assert furthest(images["base", PROMPT, 42], plain()) <= ROUNDING


def test_img2img_starts_from_the_middle_square_of_the_image(demo, draw, plain, tmp_path):
    photo = Image.open(next(demo.data.glob("*.png"))).convert("RGB").resize((160, 120))
    photo.save(tmp_path / "photo.png")
    _, images = draw("--prompt", PROMPT, "--image", tmp_path / "photo.png", "--strength", 0.7)
    square = photo.crop((20, 0, 140, 120)).resize((64, 64), Image.Resampling.LANCZOS)
    expected = plain(kind=StableDiffusionXLImg2ImgPipeline, image=square, strength=0.7)
    assert furthest(images["base", PROMPT, 42], expected) <= ROUNDING


@pytest.mark.parametrize("scheduler", ["euler_a", "ddim", "dpmpp_2m_sde_karras", "unipc", "lcm"])
def test_an_image_depends_on_its_seed_and_not_on_those_beside_it(draw, scheduler):
    flags = ["--prompt", PROMPT, "--scheduler", scheduler]
    _, together = draw(*flags, "--num_images", 3, "--batch_size", 2)
    together = {seed: image.copy() for (_, _, seed), image in together.items()}
    _, alone = draw(*flags, "--seed", 43)
    assert sorted(together) == [42, 43, 44]
    assert furthest(together[43], alone["base", PROMPT, 43]) <= ROUNDING < furthest(together[42], together[43])


# ---------------------------------------------------------------- what it writes


def test_manifest_and_png_say_how_each_image_was_made(trained, draw, tmp_path):
    manifest, _ = draw("--compare", "--lora", f"{trained}:0.5", "--num_images", 2, "--negative_prompt", "the sea")
    weights = trained / "pytorch_lora_weights.safetensors"
    source = {"path": str(weights), "scale": 0.5, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    base, tuned = manifest["columns"]
    assert len(manifest["images"]) == 2 * 3 * 2 and base["adapters"] == [] and tuned["adapters"] == [source]
    assert base["mean_abs_difference_from_base"] == 0 < tuned["mean_abs_difference_from_base"]
    for record in manifest["images"]:
        file = tmp_path / record["file"]
        assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert record["negative_prompt"] == "the sea" and record["scheduler"] == "euler" and record["resolution"] == 64
        chunks = Image.open(file).text
        assert json.loads(chunks["settings"]).items() <= record.items()
        assert chunks["parameters"].startswith(
            f"{record['prompt']}\nNegative prompt: the sea\nSteps: {STEPS}, Sampler: euler, CFG scale: 7.5, "
        )
    assert "Lora: " in chunks["parameters"] and f"Seed: {record['seed']}, Size: 64x64" in chunks["parameters"]


def test_the_grid_holds_every_image_in_its_place(trained, draw, tmp_path):
    manifest, images = draw("--compare", "--lora", trained, "--num_images", 2)
    grid, side, step = Image.open(tmp_path / "compare.png"), grids.CELL_PX[0], grids.CELL_PX[0] + grids.GAP_PX
    rows = [(prompt, seed) for prompt in PROMPTS for seed in (42, 43)]
    top, left = find(grid, images["base", *rows[0]], side)
    for i, row in enumerate(rows):
        for j, column in enumerate(manifest["columns"]):
            x, y = left + j * step, top + i * step
            enlarged = images[column["title"], *row].resize((side, side), Image.Resampling.NEAREST)
            assert same(grid.crop((x, y, x + side, y + side)), enlarged)
    assert left > 100 and top > 20  # room for the labels


def find(grid, image, side):
    """(top, left) of an enlarged image in the grid."""
    cell = image.resize((side, side), Image.Resampling.NEAREST).tobytes()
    corners = ((y, x) for y in range(120) for x in range(300) if grid.getpixel((x, y)) == image.getpixel((0, 0)))
    return next((y, x) for y, x in corners if grid.crop((x, y, x + side, y + side)).tobytes() == cell)


def test_large_images_are_shrunk_and_long_words_cut_so_that_the_grid_stays_readable():
    image = Image.new("RGB", (1024, 1024), "#804020")
    grid = grids.grid(
        [[image, image]], ["base", "a_very_long_name_without_any_space_" * 4], ["prompt " * 40], "small print " * 40
    )
    assert grid.width < 3 * grids.CELL_PX[1] and grid.height < 2 * grids.CELL_PX[1]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def half(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    image = Image.new("RGB", (8, 8))
    files.save_png(tmp_path / "a.png", image, {})
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        files.save_png(tmp_path / "a.png", image, {})
    assert (tmp_path / "a.png").read_bytes() == before


def test_black_images_and_cut_prompts_are_pointed_out(draw, capsys, monkeypatch):
    black = Image.new("RGB", (64, 64))
    monkeypatch.setattr(sampling.Sampler, "render", lambda self, adapters, prompt, seeds, *rest: [black] * len(seeds))
    draw("--prompt", "eyes " * 80)
    said = "".join(capsys.readouterr())
    assert "images/base_00_42.png is all black" in said and "its last 5 tokens are ignored" in said


# ---------------------------------------------------------------- adapters without --lora


def test_compare_takes_the_runs_in_outputs_and_leaves_out_those_of_another_model(
    trained, draw, tmp_path, monkeypatch, capsys
):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    Path("outputs/foreign").mkdir(parents=True)
    save_file({"unet.conv_in.lora.down.weight": torch.ones(4, 9)}, "outputs/foreign/pytorch_lora_weights.safetensors")
    Path("outputs/mine").symlink_to(trained)
    manifest, _ = draw("--compare")
    said = capsys.readouterr().out
    assert len(manifest["columns"]) == 2 and manifest["columns"][1]["adapters"][0]["path"].startswith("outputs/mine/")
    assert "comparing outputs/foreign, outputs/mine" in said and "left out: --lora outputs/foreign" in said


def test_an_adapter_that_changes_no_pixel_is_pointed_out(trained, draw, capsys):
    draw("--compare", "--lora", f"{trained}:0")
    assert "x0: not one pixel differs from the base" in capsys.readouterr().out


# ---------------------------------------------------------------- memory


def test_out_of_memory_in_a_batch_gives_the_same_images_one_by_one(sampler, monkeypatch, capsys):
    """It strikes in the VAE while that is upcast, the case that leaves a diffusers pipeline broken."""
    sampler, active = sampler
    settings, decode = sampling.Settings(resolution=64, steps=2), sampler.pipeline.vae.decode

    def short_of_memory(latents, **options):
        if len(latents) > 1:
            sampler.pipeline.vae.to(torch.float64)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents, **options)

    expected = [sampler.render(active, PROMPT, [seed], settings)[0] for seed in (1, 2, 3)]
    monkeypatch.setattr(sampler.pipeline.vae, "decode", short_of_memory)
    assert all(same(*pair) for pair in zip(sampler.render(active, PROMPT, [1, 2, 3], settings), expected, strict=True))
    assert capsys.readouterr().out.count("out of GPU memory with") == 1
    assert all(same(*pair) for pair in zip(sampler.render(active, PROMPT, [1, 2, 3], settings), expected, strict=True))
    assert "out of GPU memory" not in capsys.readouterr().out  # what did not fit once is not tried again


def test_out_of_memory_steps_down_to_the_smallest_plan_and_then_names_the_flag(sampler, monkeypatch, capsys):
    sampler, active = sampler
    sampler.memory = "gpu"
    monkeypatch.setattr(sampler, "place", lambda: None)  # hooks need a GPU
    calls = []

    def short_of_memory(*arguments, **options):
        calls.append((sampler.memory, sampler.pipeline.vae.use_tiling))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampler.pipeline.unet, "forward", short_of_memory)
    with pytest.raises(UserError, match="--resolution 64: out of GPU memory in the smallest plan"):
        sampler.render(active, PROMPT, [1], sampling.Settings(resolution=64, steps=2))
    assert calls == [("gpu", False), ("offload", False), ("offload", True), ("sequential", True)]
    assert capsys.readouterr().out.count("out of GPU memory: ") == 3


@pytest.mark.parametrize(
    "free_gib, resolution, tier",
    [(14.5, 1024, "gpu"), (7.9, 512, "gpu"), (9.0, 1024, "offload"), (3.8, 1024, "sequential")],
)
def test_auto_picks_the_memory_tier_by_what_is_free_and_says_so(monkeypatch, free_gib, resolution, tier):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * 2**30), 16 * 2**30))
    host = device.Host(torch.device("cuda"), torch.float16, reason="", rank=0, world=1, started_s=0.0)
    chosen, reason = sampling.choose_memory("auto", host, sampling.Settings(resolution=resolution), batch_size=1)
    assert chosen == tier and f"{free_gib} GiB" in reason


# ---------------------------------------------------------------- what is refused


def test_a_colon_separates_a_scale_only_where_a_number_follows_and_no_such_file_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "run:2", "C:lora.safetensors"):
        Path(name).touch()
    read = {text: (str(adapter.path), adapter.scale) for text in ("run", "run:0.5", "run:-.5", "run:2", "run:2:3", "C:lora.safetensors:1.5")
            for adapter in [chosen_adapters.parse_lora(text)]}  # fmt: skip
    assert read == {
        "run": ("run", 1.0), "run:0.5": ("run", 0.5), "run:-.5": ("run", -0.5), "run:2": ("run:2", 1.0), "run:2:3": ("run:2", 3.0),
        "C:lora.safetensors:1.5": ("C:lora.safetensors", 1.5),
    }  # fmt: skip
    for text in ("absent", "run:nan", "run:inf", "run:"):
        with pytest.raises(UserError, match=f"--lora {text}: "):
            chosen_adapters.parse_lora(text)


MISTAKES = {
    "--steps 0": "--steps 0: must be at least 1",
    "--num_images 0": "--num_images 0: must be at least 1",
    "--resolution 100": "--resolution 100: must be a multiple of 8, at least 64; the nearest is 96",
    "--guidance_scale -1": "--guidance_scale -1.0: must be 0 or greater",
    "--lora_scale nan": "--lora_scale nan: must be a number",
    "--strength 0": "--strength 0.0: must be more than 0",
    "--scheduler eular": "invalid choice: 'eular'",
    "--stepps 3": "did you mean --steps?",
    "--image absent.png": "--image absent.png: no such file",
    "--image broken.png": "--image broken.png: cannot be read",
    "--image broken.png --steps 1 --strength 0.5": "of 1 steps it leaves none",
    "--lora absent": "--lora absent: no such file or folder",
    "--lora lora.bin": "--lora lora.bin: only .safetensors files are read",
    "--lora broken.safetensors": "--lora broken.safetensors: damaged",
    "--lora empty": "--lora empty: neither pytorch_lora_weights.safetensors nor adapter_model.safetensors in it",
    "--ema --lora empty": "--ema: no ema_unet in empty",
    "--compare": "--compare: no adapter given and no outputs/",
    "--output_dir lora.bin": "lora.bin is a file; name a folder",
    "--output_dir lora.bin/sub": "lora.bin is a file; name a folder",
    "--seed -1": "--seed -1: must be at least 0",
    "--ema": "--ema: there is no adapter",
    "--lora_scale 0.5": "--lora_scale: there is no adapter",
    "--memory offload": "--memory offload: needs a CUDA GPU",
    "--pretrained_model_name_or_path ./absent": "--pretrained_model_name_or_path ./absent: no such folder or file",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_costs_one_line_and_writes_nothing(typed, tmp_path, monkeypatch, files_in):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("broken.png", "broken.safetensors", "lora.bin"):
        Path(name).write_text("not what its name says")
    before = files_in(tmp_path)
    with pytest.raises(UserError) as refusal:
        infer.main(["--demo", *typed.split()])
    assert MISTAKES[typed] in str(refusal.value) and "\n" not in str(refusal.value)
    assert files_in(tmp_path) == before


def test_help_and_mistakes_are_answered_without_torch(root, answer):
    status, said, errors = answer(root / "infer.py", "--help")
    assert (status, errors) == (0, "") and "--compare" in said
    refusal = "infer.py: error: --lora absent: no such file or folder (PATH or PATH:SCALE)\n"
    assert answer(root / "infer.py", "--compare", "--lora", "absent") == (2, "", refusal)


def test_the_documented_defaults():
    flags = parse(infer.Flags, [])
    assert (flags.resolution, flags.steps, flags.guidance_scale, flags.seed, flags.scheduler) == (
        1024,
        30,
        7.5,
        42,
        "euler",
    )
    assert infer.REFERENCE_PROMPTS == [
        "Naruto Uzumaki eating ramen",
        "Bill Gates in Naruto style",
        "A boy with blue eyes in Naruto style",
    ]


def test_columns_of_equal_names_have_files_of_their_own():
    """Titles that differ only in what a file name cannot hold, and one that is called like the base."""
    used, stems = [], []
    for title in ("base", "a b", "a_b", "a/b", "日本", "base"):
        used.append(columns.unused(title, used, "{} ({})"))
        stems.append(columns.stem_of(used[-1], stems))
    assert used == ["base", "a b", "a_b", "a/b", "日本", "base (2)"]
    assert stems == ["base", "a_b", "a_b_2", "a_b_3", "日本", "base_2"]


# ---------------------------------------------------------------- what was drawn before


def test_nothing_that_was_drawn_before_is_written_over(draw, trained, tmp_path, files_in):
    """Three drawings into one folder, the second without a grid: every picture, grid and manifest stays as it was and is found."""
    first, _ = draw("--prompt", PROMPT, "--compare", "--lora", trained)
    before = {name: data for name, data in files_in(tmp_path).items() if not name.endswith(".json")}
    second, _ = draw("--prompt", "another prompt")
    third, _ = draw("--prompt", PROMPT, "--compare", "--lora", trained, "--guidance_scale", 2)
    after = files_in(tmp_path)
    assert (
        set(before.values()) <= set(after.values()) and len([name for name in after if name.startswith("images/")]) == 5
    )
    assert after["compare_1.png"] == before["compare.png"] != after["compare.png"]
    kept = [json.loads(after[f"manifest{suffix}.json"]) for suffix in ("_1", "_2", "")]
    assert kept == [first | {"grid": "compare_1.png"}, second, third] and third["grid"] == "compare.png"
    for manifest in kept:
        for record in manifest["images"]:
            assert record["sha256"] == hashlib.sha256(after[record["file"]]).hexdigest()
    assert [record["file"] for record in third["images"]] == [
        "images/base_00_42_3.png",
        f"images/{trained.name}_00_42_2.png",
    ]


def test_after_make_demo_the_run_is_found(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs/demo").mkdir(parents=True)
    Path("outputs/demo/train_opt").symlink_to(trained)
    found = chosen_adapters.chosen_adapters(parse(infer.Flags, ["--demo", "--compare"]))
    assert [str(adapter.path) for adapter in found] == ["outputs/demo/train_opt"]
    with pytest.raises(UserError, match="no adapter given"):  # it would not fit another model
        chosen_adapters.chosen_adapters(parse(infer.Flags, ["--compare"]))


def test_a_checkpoint_means_the_adapter_of_its_step(trained):
    from common.adapter_files.reading import find_adapter

    (checkpoint,) = trained.glob("checkpoint-*")
    assert find_adapter(checkpoint) == trained / "pytorch_lora_weights_000003.safetensors"
    assert columns.title_of(find_adapter(checkpoint), 1) == f"{trained.name} step 3"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{run}:0,8", "'0,8' is no number; a scale is written .*:0.8"),
        ("{run}:strong", "'strong' is no number"),
        ("0.8", "behind its adapter, PATH:0.8"),
        ("{run}x:0.8", "no such file or folder"),
    ],
)
def test_a_scale_that_is_none_is_not_taken_for_a_missing_file(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        chosen_adapters.parse_lora(text.format(run=tmp_path))

"""GPU memory that runs out, simulated at each place where it can: something leaner is tried, and nothing that was trained is lost."""

import contextlib
import functools
import gc
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from common import errors
from common.cli import running
from common.data import caching, encoding
from common.model import loading, memory
from common.train import engine, pass_plan, prediction

PROMPT = ["--validation_prompt", "a cat"]
FRAMING = dict(resolution=64, center_crop=True, aspect_ratio_buckets=False)


def out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fails_when(condition, original):
    """`original`, which runs out of memory whenever `condition` holds for its arguments."""

    @functools.wraps(original)
    def limited(*arguments, **options):
        if condition(*arguments, **options):
            out_of_memory()
        return original(*arguments, **options)

    return limited


def fails_first(times, original):
    """`original`, which runs out of memory the first times."""
    left = [None] * times
    return fails_when(lambda *_, **__: bool(left) and left.pop() is None, original)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError(), False),
    ],
)
def test_an_error_of_any_library_that_says_so_counts(error, expected):
    assert errors.ran_out(error) is expected


# ---------------------------------------------------------------- encoding


@pytest.fixture(scope="module")
def parts(assemble):
    return assemble()


@pytest.fixture(scope="module")
def pictures():
    return list(torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        (1, ["while encoding images: one at a time from"]),
        (2, ["while encoding images: one at a time from", "while encoding images: one at a time on the CPU"]),
    ],
)
def test_images_are_encoded_in_less_memory_to_the_same_moments(parts, pictures, monkeypatch, capsys, failures, said):
    expected = encoding.ImageEncoder(parts.data.model, parts.engine.host)(pictures)
    monkeypatch.setattr(AutoencoderKL, "encode", fails_first(failures, AutoencoderKL.encode))
    encoder = encoding.ImageEncoder(parts.data.model, parts.engine.host)
    for _ in range(2):  # what did not fit is not tried, or announced, again
        for found, whole in zip(encoder(pictures), expected, strict=True):
            assert torch.allclose(found, whole, atol=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))


@pytest.mark.parametrize("failures", [1, 2])
def test_captions_are_encoded_in_less_memory_to_the_same_embeddings(parts, monkeypatch, failures):
    captions = ["a cat", "a laughing boy with blue eyes"]
    expected = encoding.CaptionEncoder(parts.data.model, parts.engine.host)(captions)
    monkeypatch.setattr(encoding, "encode_text", fails_first(failures, encoding.encode_text))
    found = encoding.CaptionEncoder(parts.data.model, parts.engine.host)(captions)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["load_vae", "load_text_encoders"])
def test_what_encodes_stays_on_the_cpu_where_the_gpu_has_no_room(parts, monkeypatch, name, capsys):
    places = []
    original = getattr(loading, name)
    monkeypatch.setattr(loading, name, fails_first(1, lambda model, host: places.append(host) or original(model, host)))
    encoder = encoding.ImageEncoder if name == "load_vae" else encoding.CaptionEncoder
    encoder(parts.data.model, parts.engine.host)
    assert [(host.device.type, host.dtype) for host in places] == [("cpu", torch.float32)]
    assert "on the CPU" in capsys.readouterr().out


def test_encoders_are_gone_once_they_have_encoded(parts, tmp_path):
    """The UNet comes next: on a 6.5 GiB card there is no room beside them. Reference cycles do not wait for the collector's own time."""
    model, host, samples = parts.data.model, parts.engine.host, parts.data.examples.latents.samples
    gc.collect()
    before = count_modules()
    gc.disable()
    try:
        caching.cache_latents(samples[:2], model, host=host, cache_dir=tmp_path, max_bad=0, **FRAMING)
        caching.cache_text(["a cat"], model, host=host, mode="ram", cache_dir=tmp_path)
        assert count_modules() == before
    finally:
        gc.enable()


def count_modules():
    return sum(isinstance(thing, torch.nn.Module) for thing in gc.get_objects())


def test_an_image_that_fits_nowhere_ends_the_run_in_one_line(parts, pictures, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "encode", out_of_memory)
    with pytest.raises(errors.UserError, match="out of GPU memory while encoding images: .*--resolution"):
        encoding.ImageEncoder(parts.data.model, parts.engine.host)(pictures)


# ---------------------------------------------------------------- while training


def test_a_held_out_loss_needs_no_more_than_one_image(train, monkeypatch):
    flags = ["--max_train_steps", 2, "--validation_steps", 1, "--validation_split", 0.25]
    whole = train(*flags)
    too_many = lambda self, fields: not torch.is_grad_enabled() and len(fields["t"]) > 1  # noqa: E731
    monkeypatch.setattr(engine.Engine, "predict", fails_when(too_many, engine.Engine.predict))
    single = train(*flags)
    assert [row["val_loss"] for row in single.rows] == pytest.approx([row["val_loss"] for row in whole.rows], rel=1e-5)
    assert single.losses == whole.losses and single.same_weights(whole)


def test_a_held_out_loss_that_has_no_room_is_left_out(train, plain, monkeypatch, capsys):
    monkeypatch.setattr(prediction, "check", lambda engine, data: None)  # runs the UNet without gradients too
    validating = lambda self, fields: not torch.is_grad_enabled()  # noqa: E731
    monkeypatch.setattr(engine.Engine, "predict", fails_when(validating, engine.Engine.predict))
    run = train(
        "--max_train_steps", 3, "--validation_steps", 1, "--validation_split", 0.25, "--early_stopping_patience", 1
    )
    assert run.result["step"] == 3 and not any("val_loss" in row for row in run.rows)
    assert "no held-out loss" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train_opt", "train_qlora"])
def test_pictures_that_have_no_room_are_left_out_and_their_step_is_saved_before(
    train, few_steps, monkeypatch, capsys, script
):
    flags = ["--max_train_steps", 4, "--validation_steps", 2, "--checkpointing_steps", 0]
    expected = train(*flags, script=script)
    monkeypatch.setattr(prediction, "check", lambda engine, data: None)  # runs the UNet without gradients too
    denoising = lambda *_, **__: not torch.is_grad_enabled()  # noqa: E731
    monkeypatch.setattr(UNet2DConditionModel, "forward", fails_when(denoising, UNet2DConditionModel.forward))
    run = train(*flags, *PROMPT, script=script)
    assert run.result["step"] == 4 and run.losses == expected.losses and run.same_weights(expected)
    assert {path.name for path in run.dir.glob("checkpoint-*")} == {"checkpoint-000002", "checkpoint-000004"}
    assert not list((run.dir / "samples").glob("*.png"))
    assert "no validation images of step 2: out of GPU memory" in capsys.readouterr().out


def test_a_step_is_saved_before_its_pictures_are_drawn(train, few_steps, monkeypatch, tmp_path):
    """Whatever drawing does to the process: the step is there."""

    class Killed(BaseException):
        """What no handler catches, as a process that is killed."""

    def killed(*arguments, **options):
        raise Killed

    monkeypatch.setattr(AutoencoderKL, "decode", killed)
    with contextlib.suppress(Killed):
        train("--max_train_steps", 4, "--validation_steps", 2, "--checkpointing_steps", 0, *PROMPT, into=tmp_path)
    assert (tmp_path / "checkpoint-000002" / "state.safetensors").exists()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_picture_is_decoded_in_tiles_or_on_the_cpu(train, few_steps, monkeypatch, capsys, failures):
    flags = ["--max_train_steps", 1, "--validation_steps", 1, *PROMPT]
    expected = train(*flags)
    monkeypatch.setattr(AutoencoderKL, "decode", fails_first(failures, AutoencoderKL.decode))
    run = train(*flags)
    one, other = (Image.open(path / "samples" / "000001_0.png") for path in (expected.dir, run.dir))
    assert one.tobytes() == other.tobytes()  # at this size one tile holds all
    assert ("on the CPU" if failures == 2 else "in tiles") in capsys.readouterr().out


def test_a_pass_that_fits_no_more_ends_the_run_with_a_checkpoint_and_advice_that_resume_takes(
    train, monkeypatch, tmp_path
):
    flags = ["--max_train_steps", 4, "--gradient_checkpointing"]
    expected = train(*flags)
    with monkeypatch.context() as patch:
        passes = []
        third = lambda self, fields: passes.append(len(fields["t"])) or len(passes) > 4  # noqa: E731
        patch.setattr(engine.Engine, "forward_backward", fails_when(third, engine.Engine.forward_backward))
        with pytest.raises(errors.UserError, match="one image a pass and every block recomputed: .*--quantize nf4"):
            train(*flags, into=tmp_path)
        assert passes == [4, 4, 4, 4, 4, 2, 1]
    assert (tmp_path / "checkpoint-000002").is_dir()
    resumed = train(*flags, "--resume_from_checkpoint", "latest", "--quantize", "nf4", into=tmp_path)
    assert resumed.result["step"] == 4 and resumed.losses[:2] == expected.losses[:2]
    assert resumed.losses == pytest.approx(expected.losses, rel=0.2)


def test_a_step_that_did_not_fit_on_another_process_moves_nothing_here(assemble):
    parts = assemble("--lr_warmup_steps", 0)
    before, batches = parts.engine.flat.data.clone(), parts.data.examples.effective_batch(0, 8, 4)

    def another_reports(tensor):
        return tensor.add_(engine.StepNumbers.pack(tensor.device, out_of_memory=1.0)) if tensor.numel() < 20 else tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(parts.engine.host), "sum", lambda self, tensor: another_reports(tensor))
        with pytest.raises(engine.PassOutOfMemory) as raised:
            parts.engine.step(1, batches)
    assert not raised.value.here and torch.equal(parts.engine.flat.data, before) and not parts.engine.flat.grad.any()
    assert parts.engine.step(1, batches).applied


# ---------------------------------------------------------------- before the first step


def test_measuring_that_does_not_fit_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    stub = type(
        "Engine", (), {"forward_backward": staticmethod(out_of_memory), "optimizer_state_bytes": lambda self: 0}
    )()
    stub.host = SimpleNamespace(device=torch.device("cpu"), start_new_peak=lambda: None)
    stub.recompute = None
    batch = type("Batch", (), {"tensors": {}})
    with pytest.raises(errors.OutOfMemory, match="with one image a pass: add --gradient_checkpointing, or "):
        pass_plan._probe(stub, batch)


def test_loading_that_does_not_fit_is_one_line_and_status_2(train, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_unet", out_of_memory)
    with pytest.raises(SystemExit) as raised:
        running.run(lambda: train("--max_train_steps", 1))
    assert raised.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].partition("error: ")[2].startswith("out of GPU memory while loading: ")
    )


def test_the_cache_is_not_filled_by_what_failed(parts, pictures, monkeypatch):
    store = caching.Store()
    monkeypatch.setattr(AutoencoderKL, "encode", out_of_memory)
    encoder = encoding.ImageEncoder(parts.data.model, parts.engine.host)
    with pytest.raises(errors.OutOfMemory):
        caching._encode_batch([(None, pictures[0])], store, encoder, parts.engine.host)
    assert not store._pending


@pytest.mark.parametrize(
    ("fitting", "expected"), [(1000, (4, {"a", "b"})), (350, (4, {"b"})), (100, (4, set())), (0, (1, set()))]
)
def test_a_plan_that_does_not_fit_after_all_keeps_less(monkeypatch, fitting, expected):
    """Room for both blocks by the estimate, of which `fitting` bytes are really there; larger passes are the faster ones."""
    sizes = {"a": 50, "b": 50}
    monkeypatch.setattr(pass_plan, "_probe", lambda *_: (0, 0, sizes))
    monkeypatch.setattr(pass_plan, "SPARE_GIB", 0)

    def seconds(engine, make_batches, size, kept):
        needed = size * (1 + sum(sizes[block] for block in kept))
        return (10 - size) if needed <= fitting else math.inf

    monkeypatch.setattr(pass_plan, "_seconds_per_image", seconds)
    stub = SimpleNamespace(host=SimpleNamespace(say=print), recompute=pass_plan.BlockRecompute())
    plan, line, _ = pass_plan._measure(stub, lambda size: [None], 4, 400 / memory.device.GIB)
    assert (plan.micro_batch, stub.recompute.kept) == expected and "inf" not in line

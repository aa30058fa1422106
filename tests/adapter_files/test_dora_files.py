"""DoRA for other tools: the kohya file draws what diffusers' file draws, of a 4-bit run too; as a LoRA it is the nearest there is."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_foreign_adapters import UNET, merged_weights
from test_formats import ATTENTION, RESIDUAL, shake

from common.adapter_files import diffusers_format, dora, kohya, names
from common.errors import UserError
from common.model import adapters


@pytest.fixture(scope="module")
def base(demo):
    """The UNet's weights, on which readers draw."""
    return load_file(demo.model / UNET)


@pytest.fixture(scope="module")
def run(train):
    """A short QDoRA with an average, written as a LoRA of full rank too."""
    flags = [
        "--max_train_steps",
        2,
        "--learning_rate",
        1e-2,
        "--lr_warmup_steps",
        0,
        "--lora_rank",
        4,
        "--lora_alpha",
        8,
        "--use_ema",
    ]
    return train(*flags, "--quantize", "nf4", "--export_dora_as_lora", 64, script="train_dora")


@pytest.fixture(scope="module")
def by_diffusers(run, fresh):
    """{file name in the run: the UNet's weights with that adapter fused in}."""
    return {
        name: merged_weights(fresh(), run.dir / name)
        for name in (diffusers_format.WEIGHTS, f"ema_unet/{diffusers_format.WEIGHTS}")
    }


def adapted(weights, base):
    """Names of the weights that an adapter has changed."""
    return [name for name in base if not torch.equal(weights[name], base[name])]


def by_comfyui(file, base):
    """What ComfyUI v0.3.77 makes of a kohya file: (W + alpha / rank up down) dora_scale / ||W||, norms over rows."""
    tensors, weights = load_file(file), {}
    for name, weight in base.items():
        key = names.kohya_key("unet", name.removesuffix(".weight"), layers_per_block=2)
        if f"{key}.dora_scale" in tensors:
            up, down = (tensors[f"{key}.{kind}.weight"].float() for kind in ("lora_up", "lora_down"))
            merged = weight + tensors[f"{key}.alpha"] / len(down) * up @ down
            weights[name] = merged * (tensors[f"{key}.dora_scale"] / weight.norm(dim=1, keepdim=True))
    return weights


@pytest.mark.parametrize("file, average", [("", False), ("_ema", True)], ids=["as trained", "the average"])
def test_the_kohya_file_of_a_4_bit_run_is_right_on_the_weights_that_its_readers_have(
    run, by_diffusers, base, file, average
):
    expected = by_diffusers[f"ema_unet/{diffusers_format.WEIGHTS}" if average else diffusers_format.WEIGHTS]
    weights = by_comfyui(run.dir / "kohya" / f"{run.dir.name}{file}.safetensors", base)
    assert sorted(weights) == sorted(adapted(expected, base))
    assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in weights)


def test_average_and_weights_as_trained_are_different_files(by_diffusers, base):
    trained, average = by_diffusers.values()
    assert any((trained[name] - average[name]).abs().max() > 1e-3 for name in adapted(trained, base))


def test_as_a_lora_of_full_rank_a_dora_is_the_same_weight(run, by_diffusers, base, fresh):
    file = run.dir / "kohya" / f"{run.dir.name}_as_lora.safetensors"
    now, expected = merged_weights(fresh(), file), by_diffusers[diffusers_format.WEIGHTS]
    assert adapted(now, base) == adapted(expected, base) and not any("dora_scale" in key for key in load_file(file))
    assert all(torch.allclose(now[name], expected[name], atol=1e-3) for name in base)


def test_the_share_that_a_lora_holds_is_that_of_the_largest_singular_values(fresh, base, tmp_path):
    unet = fresh().unet
    adapters.add_lora(unet, ATTENTION + RESIDUAL, rank=4, alpha=8, use_dora=True)
    shake(unet)
    diffusers_format.save_adapter(tmp_path / "dora.safetensors", unet, {})
    share = kohya.save_kohya(tmp_path / "as_lora.safetensors", unet, {}, dora_rank=3)
    now = merged_weights(fresh(), tmp_path / "dora.safetensors")
    changed = [name for name in base if not torch.equal(now[name], base[name])]
    squares = [torch.linalg.svdvals((now[name] - base[name]).flatten(1)).square() for name in changed]
    held, everything = sum(s[:3].sum() for s in squares), sum(s.sum() for s in squares)
    assert share == pytest.approx((held / everything).sqrt().item(), abs=1e-4) and share < 0.99
    with safe_open(tmp_path / "as_lora.safetensors", "pt") as file:
        assert file.metadata()["dora_as_lora"] == f"rank 3 of the DoRA's change: {share:.4f} of its norm"
        assert (file.metadata()["ss_network_dim"], file.metadata()["ss_network_alpha"]) == ("3", "3")
        assert "dora_norm" not in file.metadata()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)], ids=str)
@pytest.mark.parametrize("of_rank", [3, 24], ids=["of low rank", "of full rank"])
def test_no_matrix_of_that_rank_is_nearer(shape, of_rank):
    generator = torch.Generator().manual_seed(0)
    matrix = (
        1e-3 * torch.randn(shape[0], of_rank, generator=generator) @ torch.randn(of_rank, shape[1], generator=generator)
    )
    up, down = dora.low_rank(matrix, 5)
    assert (
        up.shape == (shape[0], 5)
        and down.shape == (5, shape[1])
        and up.half().isfinite().all()
        and down.half().isfinite().all()
    )
    left_out = torch.linalg.svdvals(matrix.double())[5:].norm().item()
    assert (matrix - up @ down).norm().item() == pytest.approx(left_out, rel=1e-3, abs=1e-6)


def test_a_layer_that_has_not_changed_stays_as_it_is():
    up, down = dora.low_rank(torch.zeros(6, 8), 2)
    assert not (up @ down).any()


def test_a_dora_says_in_its_kohya_file_and_at_the_end_which_tools_are_exact(run, train, capsys):
    with safe_open(run.dir / "kohya" / f"{run.dir.name}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (
        metadata["dora_norm"] == "base"
        and "ComfyUI v0.3.77" in metadata["dora_exact_in"]
        and "A1111" in metadata["dora_wrong_in"]
    )
    again = train("--max_train_steps", 1, script="train_dora")
    said = capsys.readouterr().out
    assert (
        "pytorch_lora_weights.safetensors: for diffusers and infer.py" in said and "--export_dora_as_lora RANK" in said
    )
    assert f"kohya/{again.dir.name}.safetensors: for ComfyUI and Forge only" in said

    # asked for afterwards
    flags = ["--resume_from_checkpoint", "latest", "--export_dora_as_lora", 2]
    train("--max_train_steps", 1, *flags, script="train_dora", into=again.dir)
    assert "% of the DoRA's change, by its norm" in capsys.readouterr().out
    assert (again.dir / "kohya" / f"{again.dir.name}_as_lora.safetensors").is_file()


def test_a_lora_says_that_its_kohya_file_is_for_all(train, capsys):
    run = train("--max_train_steps", 1)
    assert f"kohya/{run.dir.name}.safetensors: for ComfyUI, Forge, A1111 and kohya's scripts" in capsys.readouterr().out
    with safe_open(run.dir / "kohya" / f"{run.dir.name}.safetensors", "pt") as file:
        assert not any(name.startswith("dora") for name in file.metadata())


def test_a_rank_below_one_is_refused(train):
    with pytest.raises(UserError, match="--export_dora_as_lora 0: must be at least 1"):
        train("--export_dora_as_lora", 0, script="train_dora")


def test_what_diffusers_reads_is_the_least_that_rebuilds_the_adapter(run):
    """Defaults are left out: an older PEFT may not know them. But diffusers 0.37 and 0.39 fail without a rank_pattern."""
    with safe_open(run.dir / diffusers_format.WEIGHTS, "pt") as file:
        metadata = file.metadata()
    described = json.loads(metadata[diffusers_format.ADAPTER_METADATA])
    needed = {"lora_alpha": 8, "r": 4, "rank_pattern": {}, "target_modules": sorted(ATTENTION), "use_dora": True}
    assert {
        name.removeprefix("unet."): value for name, value in described.items() if "peft_version" not in name
    } == needed
    assert json.loads(metadata["recipe"])["flags"]["lora_dropout"] == 0.1

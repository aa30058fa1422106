"""What a trainer refuses: images, hubs, targets and models, in one line that names flag or file, with nothing written."""

import errno
import json
import os
import shutil
import socket
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from common.errors import UserError


def test_bad_images_count_together_however_they_are_found_out(train, demo, tmp_path):
    """One that is no image, and one whose end is missing: two."""
    shutil.copytree(demo.data, tmp_path / "data")
    (tmp_path / "data/003.png").write_text("not an image")
    Image.open(tmp_path / "data/005.png").convert("RGB").save(tmp_path / "data/005.png", "JPEG")
    data = (tmp_path / "data/005.png").read_bytes()
    (tmp_path / "data/005.png").write_bytes(data[: len(data) // 2])
    flags = ["--max_train_steps", 1, "--train_data_dir", tmp_path / "data"]
    with pytest.raises(UserError, match="003.png"):
        train(*flags)
    with pytest.raises(UserError, match="005.png.*--max_bad_images 2"):
        train(*flags, "--max_bad_images", 1, into=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    run = train(*flags, "--max_bad_images", 2)
    assert json.loads((run.dir / "config.json").read_text())["data"]["images"] == 22


# ---------------------------------------------------------------- a hub that is not there


@pytest.fixture
def silent_hub():
    """A server that takes connections and never answers: its address, and the connections it took."""
    server, taken = socket.create_server(("127.0.0.1", 0)), []

    def take():
        try:
            while True:
                taken.append(server.accept())
        except OSError:  # closed
            return

    threading.Thread(target=take, daemon=True).start()
    yield SimpleNamespace(address=f"http://127.0.0.1:{server.getsockname()[1]}", taken=taken)
    server.close()


@pytest.mark.parametrize("hub", ["refusing", "silent"])
def test_an_unreachable_hub_gets_one_line_and_is_waited_for_ten_seconds_at_most(root, start, silent_hub, tmp_path, hub):
    """And what to do without it. The libraries alone would try again for 47 s. Nothing is written."""
    from common.cli.hub import PROBE_S

    (tmp_path / "work").mkdir()
    address = silent_hub.address if hub == "silent" else "http://127.0.0.1:9"
    process = start(
        root / "train_opt.py",
        cwd=tmp_path / "work",
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT=address,
        HF_HOME=str(tmp_path / "hf"),
    )
    out, err = process.communicate(timeout=3600)
    lines = [line for line in err.splitlines() if "error:" in line]
    assert process.returncode == 2 and "Traceback" not in err and len(lines) == 1
    assert all(part in lines[0] for part in ("--dataset_name lambdalabs/naruto-blip-captions", "--demo", "local path"))
    assert list((tmp_path / "work").iterdir()) == []
    assert PROBE_S * len(silent_hub.taken) <= 10 and bool(silent_hub.taken) == (hub == "silent")


@pytest.mark.parametrize("flag", ["dataset_name", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"])
def test_offline_a_hub_id_is_named_with_its_flag(demo, tmp_path, flag):
    import train_opt

    local = {"dataset_name": [], "pretrained_model_name_or_path": ["--train_data_dir", str(demo.data)]}
    local["pretrained_vae_model_name_or_path"] = [
        *local["pretrained_model_name_or_path"],
        "--pretrained_model_name_or_path",
        str(demo.model),
    ]
    with pytest.raises(UserError) as caught:
        train_opt.main([*local[flag], f"--{flag}", "someone/something", "--output_dir", str(tmp_path / "run")])
    assert all(part in str(caught.value) for part in (f"--{flag} someone/something", "--demo", "local path"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- what is not SDXL


def refused(train, into, *flags):
    with pytest.raises(UserError) as caught:
        train("--max_train_steps", 1, *flags, into=into)
    assert "\n" not in str(caught.value) and not into.exists()
    return str(caught.value)


@pytest.mark.parametrize("target", ["attn1", "nowhere"])
def test_a_target_that_cannot_be_adapted_is_refused(train, tmp_path, target):
    assert f"--lora_target_modules {target}" in refused(train, tmp_path / "run", "--lora_target_modules", target)


def test_convolutions_are_adapted_by_peft_alone(train, tmp_path):
    flags = ["--lora_target_modules", "to_q", "conv1"]
    assert "--lora_backend peft" in refused(train, tmp_path / "run", *flags)
    run = train(*flags, "--lora_backend", "peft", "--max_train_steps", 1, into=tmp_path / "run")
    assert any("conv1" in name for name in run.weights())


def test_a_model_of_another_kind_is_refused_by_its_parts(train, demo, tmp_path):
    shutil.copytree(demo.model, tmp_path / "model")
    model = ["--pretrained_model_name_or_path", tmp_path / "model"]
    config = tmp_path / "model/unet/config.json"
    config.write_text(config.read_text().replace("UNet2DConditionModel", "SD3Transformer2DModel"))
    assert "its unet is SD3Transformer2DModel" in refused(train, tmp_path / "run", *model)
    shutil.rmtree(tmp_path / "model/text_encoder_2")
    shutil.copytree(demo.model / "unet", tmp_path / "model/unet", dirs_exist_ok=True)
    assert "no readable text_encoder_2/config.json" in refused(train, tmp_path / "run", *model)


@pytest.mark.parametrize("content", ["{", "[1]", None])
@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("model_index.json", "no (readable )?model_index.json"),
        ("vae/config.json", "vae"),
        ("scheduler/scheduler_config.json", "no readable scheduler/scheduler_config.json"),
        ("tokenizer_2/tokenizer_config.json", "no readable tokenizer_2/tokenizer_config.json"),
    ],
)
def test_an_incomplete_model_is_refused_before_anything_is_encoded(demo, tmp_path, file, named, content):
    from common.model import loading

    shutil.copytree(demo.model, tmp_path / "model")
    (tmp_path / "model" / file).unlink() if content is None else (tmp_path / "model" / file).write_text(content)
    with pytest.raises(UserError, match=named):
        loading.find_model(str(tmp_path / "model"))


def test_a_tokenizer_that_cannot_be_read_is_named(demo, tmp_path):
    from common.model import device, loading

    shutil.copytree(demo.model, tmp_path / "model")
    (tmp_path / "model/tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer: cannot be read"):
        loading.load_text_encoders(loading.find_model(str(tmp_path / "model")), device.start("no"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG])
def test_a_disk_that_is_full_is_one_line(capsys, number):
    from common.cli import running

    def full():
        raise OSError(number, os.strerror(number), "cache/shard")

    with pytest.raises(SystemExit) as caught:
        running.run(full)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and "cache/shard" in said and os.strerror(number) in said


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="Linux has a folder in which nobody can make one")
@pytest.mark.parametrize("name", ["output_dir", "cache_dir"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_encoded(name):
    """Rights alone do not tell: to root everything is writable."""
    from common.cli.flag_checks import check_writable

    with pytest.raises(UserError, match=f"--{name} /proc/x: no right to write in /proc "):
        check_writable(name, "/proc/x")

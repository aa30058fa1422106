"""verify_setup.py: verdicts follow from facts, and the facts of this machine are there in seconds."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

import verify_setup
from common.command_line import UserError
from verify_setup import DATA, DISK_GB, MODEL, REPOS, Facts, judge, kaggle_inputs, probe_packages, table

OFFLINE = dict.fromkeys(REPOS, "unreachable (ConnectError)")


def facts(*gpus_free_gib, capability="7.5", rate=25.0, **changes):
    """A healthy machine with GPUs of these free GiB."""
    card = dict(name="Tesla T4", capability=capability, bf16=float(capability) >= 8)
    gpus = [dict(card, total_gib=free + 0.4, free_gib=free) for free in gpus_free_gib]
    packages, disk = {"torch": ("2.6.0", "", True)}, {name: ("/kaggle/working", 60.0) for name in DISK_GB}
    healthy = Facts("3.11.7", packages, "Kaggle", 4, 29.0, disk, dict.fromkeys(REPOS, "reachable"))
    return dataclasses.replace(healthy, gpus=gpus, matmul_tflops=rate if gpus else None, **changes)


@pytest.mark.parametrize(
    ("free_gib", "recommended"),
    [
        (14.5, "train_sdxl.py"),
        (13.0, "train_sdxl.py"),
        (12.9, "train_opt.py"),
        (7.6, "train_opt.py"),
        (6.2, "train_qlora.py"),
        (3.9, "train_qlora.py"),
        (3.5, "--demo"),
    ],
)
def test_the_recommended_script_suits_the_memory(free_gib, recommended):
    verdict = judge(facts(free_gib))
    assert verdict["recommended"] == recommended and not verdict["problems"]
    assert verdict["command"] == f"python {'train_opt.py --demo' if recommended == '--demo' else recommended}"


def test_a_machine_without_a_gpu_runs_the_demo_whatever_the_hub_and_the_disk_say():
    verdict = judge(facts(hub=OFFLINE, disk={name: ("/", 0.2) for name in DISK_GB}, driver=True))
    assert verdict["recommended"] == "--demo" and not verdict["problems"]
    assert all("needs a GPU" in script["line"] and not script["fits"] for script in verdict["scripts"].values())
    assert "torch sees no GPU" in " ".join(verdict["notes"])


def test_time_comes_from_the_measured_rate():
    """8,000 images of 2 x 6.761 TFLOP at 39 % of 25 TFLOP/s."""
    found = judge(facts(14.5))["scripts"]["train_sdxl.py"]
    assert found["s_per_img"] == pytest.approx(2 * 6.761 / (25 * 0.39)) and "estimate 1.4 s an image, 3.1 h" in found["line"]
    assert judge(facts(14.5, rate=50.0))["scripts"]["train_sdxl.py"]["hours"] == pytest.approx(found["hours"] / 2)
    assert judge(facts(14.5, rate=None))["scripts"]["train_sdxl.py"]["line"] == "fits: 6.5 GiB needed"


def test_a_script_that_does_not_fit_says_what_is_lacking():
    assert judge(facts(4.0))["scripts"]["train_sdxl.py"]["line"] == "does not fit: 6.5 GiB needed, 4.0 free"


def test_the_second_gpu_is_put_to_use():
    verdict = judge(facts(14.5, 14.5))
    assert verdict["command"] == "accelerate launch --num_processes 2 train_sdxl.py" and "would idle" in " ".join(verdict["notes"])


def test_bf16_is_for_capability_8_and_up():
    assert "no bf16" in " ".join(judge(facts(14.5))["notes"]) and not judge(facts(14.5, capability="8.0"))["notes"]


def test_a_hub_out_of_reach_is_a_problem_unless_a_folder_is_attached():
    first, second = judge(facts(14.5, hub=OFFLINE))["problems"]
    assert MODEL in first and "--pretrained_model_name_or_path" in first and DATA in second and "--train_data_dir" in second
    attached = judge(facts(14.5, hub=OFFLINE, kaggle_models=["/kaggle/input/sdxl"], kaggle_data=["/kaggle/input/ink"]))
    assert not attached["problems"]
    assert attached["command"].endswith("--pretrained_model_name_or_path /kaggle/input/sdxl --train_data_dir /kaggle/input/ink")


def test_attached_folders_are_found_and_not_entered(tmp_path):
    for name in (
        "models/sdxl/1/model_index.json",
        "models/sdxl/1/unet/metadata.jsonl",
        "ink/metadata.jsonl",
        "a/b/c/d/e/f/g/metadata.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert kaggle_inputs(str(tmp_path)) == ([str(tmp_path / "models/sdxl/1")], [str(tmp_path / "ink")])
    assert kaggle_inputs(str(tmp_path / "absent")) == ([], [])


def test_a_full_disk_stops_a_download_and_not_a_cached_model():
    full = {**facts().disk, "HF cache": ("/root/.cache", 3.0)}
    assert "3.0 GB free, about 9 needed" in judge(facts(14.5, disk=full))["problems"][0]
    assert not judge(facts(14.5, disk=full, hub=dict.fromkeys(REPOS, "cached")))["problems"]


def test_where_nothing_may_be_written_nothing_is_free(tmp_path, monkeypatch):
    assert verify_setup.free_gb(tmp_path / "not yet there") > 0
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    assert verify_setup.free_gb(tmp_path / "not yet there") == 0


def test_an_old_python_and_a_package_out_of_range_or_absent_are_problems_with_their_cure(tmp_path):
    (tmp_path / "requirements.txt").write_text("# comment\ntorch>=99\nnobody-makes-this>=1\npillow\n")
    found = probe_packages(tmp_path / "requirements.txt")
    assert not found["torch"][2] and found["nobody-makes-this"] == (None, ">=1", False) and found["pillow"][2] and found["xformers"][2]
    problems = judge(facts(14.5, packages=found, python="3.9.1"))["problems"]
    assert "3.11 or newer" in problems[0] and "pip install 'torch>=99'" in problems[1] and "nobody-makes-this is missing" in problems[2]


def test_a_failed_smoke_test_stops_only_what_needs_it():
    broken = {"NF4 weights": "RuntimeError: no kernel image"}
    assert judge(facts(4.0, smoke=broken))["problems"] == ["NF4 weights: RuntimeError: no kernel image"]
    assert not judge(facts(14.5, smoke=broken))["problems"] and "no kernel image" in judge(facts(14.5, smoke=broken))["notes"][0]
    assert judge(facts(14.5, smoke={"attention": "RuntimeError: no kernel"}))["problems"]


@pytest.mark.parametrize("offline", ["0", "1"])
def test_this_machine_is_judged_within_ten_seconds(root, start, offline):
    """Also where the hub's address leads nowhere."""
    started = time.monotonic()
    process = start(root / "verify_setup.py", "--json", HF_HUB_OFFLINE=offline, HF_ENDPOINT="http://127.0.0.1:9", CUDA_VISIBLE_DEVICES="")
    output, errors = process.communicate(timeout=30)
    found = json.loads(output)
    assert time.monotonic() - started < 10 and process.returncode == 0 and not found["problems"], errors
    assert found["smoke"] == {"matmul": "ok", "NF4 weights": "ok"} and found["recommended"] == "--demo"
    assert all(("HF_HUB_OFFLINE" if offline == "1" else "unreachable") in state for state in found["hub"].values())


def test_the_exit_status_is_that_of_the_problems(monkeypatch, capsys):
    monkeypatch.setattr(verify_setup, "probe", lambda: facts(14.5, packages={"torch": (None, ">=2", False)}))
    assert verify_setup.main([]) == 1 and "torch is missing" in capsys.readouterr().out
    monkeypatch.setattr(verify_setup, "probe", lambda: facts(14.5))
    assert verify_setup.main(["--json"]) == 0 and json.loads(capsys.readouterr().out)["recommended"] == "train_sdxl.py"
    with pytest.raises(UserError, match="--jsonn"):
        verify_setup.main(["--jsonn"])


def test_a_wrong_flag_is_one_line_and_2(root):
    process = subprocess.run([sys.executable, root / "verify_setup.py", "--jsonn"], capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "did you mean --json?" in process.stderr


def test_the_table_names_everything():
    found = facts(14.5, kaggle_data=["/kaggle/input/ink"])
    text = table(found, {**judge(found), "seconds": 1.0})
    for part in ("Tesla T4", "torch 2.6.0", "/kaggle/working", "/kaggle/input/ink", MODEL, "\nrecommended (ready): python train_sdxl.py"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 132

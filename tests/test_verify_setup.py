"""verify_setup.py: verdicts follow from facts, and the facts of this machine are there in seconds."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest

import verify_setup
from common.flags import UserError
from verify_setup import Facts, judge, probe_packages, table


def facts(*gpus_free_gib, capability="7.5", rate=25.0, **changes):
    """A healthy machine with GPUs of these free GiB."""
    gpus = [dict(name="Tesla T4", capability=capability, total_gib=free + 0.4, free_gib=free) for free in gpus_free_gib]
    healthy = Facts("3.11", {"torch": ("2.6.0", "any", True)}, "Kaggle", 4, 29.0, {"/kaggle/working": 20.0}, {"model": "cached"}, [])
    return dataclasses.replace(healthy, gpus=gpus, matmul_tflops=rate if gpus else None, **changes)


@pytest.mark.parametrize(
    ("free_gib", "recommended"),
    [(14.5, "train_sdxl.py"), (11.5, "train_opt.py"), (7.6, "train_opt.py"), (4.0, "train_qlora.py"), (2.0, "--demo")],
)
def test_the_recommended_script_suits_the_memory(free_gib, recommended):
    assert judge(facts(free_gib))["recommended"] == recommended


def test_a_machine_without_a_gpu_is_told_so_and_is_not_at_fault():
    verdict = judge(facts())
    assert verdict["recommended"] == "--demo" and not verdict["problems"]
    assert all("needs a GPU" in line for line in verdict["scripts"].values())


def test_time_comes_from_the_measured_rate():
    """8,000 images of 2 x 6.761 TFLOP at a third of 25 TFLOP/s."""
    line = judge(facts(14.5))["scripts"]["train_sdxl.py"]
    assert "about 1.64 s an image, 3.6 h" in line
    assert "about 0.82 s an image, 1.8 h" in judge(facts(14.5, rate=50.0))["scripts"]["train_sdxl.py"]


def test_what_does_not_fit_says_how_much_is_missing():
    assert judge(facts(4.0))["scripts"]["train_sdxl.py"] == "does not fit: 6.5 GiB needed, 4.0 free"


def test_a_second_gpu_an_old_gpu_and_a_full_disk_are_pointed_out():
    said = " ".join(judge(facts(14.5, 14.5, disk_gb={"/kaggle/working": 3.0, "/tmp": 60.0}))["notes"])
    assert "2 GPUs: `accelerate launch SCRIPT`" in said and "no bf16" in said and "3 GB free" in said and "more room at /tmp" in said
    assert not judge(facts(14.5, capability="8.0"))["notes"]


def test_an_unreachable_hub_names_the_repo_and_the_offline_ways():
    said = " ".join(judge(facts(14.5, hub={"some/model": "not reachable (ConnectError)"}))["notes"])
    assert "some/model" in said and "--pretrained_model_name_or_path" in said and "--demo" in said


def test_a_package_out_of_range_or_absent_is_a_problem_with_its_cure(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch>=99\nnobody-makes-this>=1\npillow\n")
    found = probe_packages(tmp_path / "requirements.txt")
    assert not found["torch"][2] and found["nobody-makes-this"][0] is None and found["pillow"][2] and found["xformers"][2]
    problems = judge(facts(14.5, packages=found))["problems"]
    assert len(problems) == 2 and "pip install 'torch>=99'" in problems[0]


def test_a_failed_smoke_test_is_a_problem():
    assert judge(facts(14.5, smoke={"4-bit weights": "RuntimeError: no kernel image"}))["problems"] == [
        "4-bit weights: RuntimeError: no kernel image"
    ]


def test_this_machine_is_judged_within_ten_seconds(root):
    started = time.monotonic()
    process = subprocess.run([sys.executable, root / "verify_setup.py", "--json"], capture_output=True, text=True)
    found = json.loads(process.stdout)
    assert time.monotonic() - started < 10 and process.returncode == bool(found["problems"]) == 0
    assert found["smoke"] == dict.fromkeys(("matrix product", "attention", "4-bit weights"), "ok") and found["recommended"] == "--demo"


def test_the_exit_status_is_that_of_the_problems(monkeypatch, capsys):
    monkeypatch.setattr(verify_setup, "probe", lambda: facts(14.5, packages={"torch": (None, ">=2", False)}))
    assert verify_setup.main([]) == 1 and "problem: torch is missing" in capsys.readouterr().out
    with pytest.raises(UserError, match="--jsonn"):
        verify_setup.main(["--jsonn"])


def test_the_table_names_everything():
    text = table(facts(14.5), judge(facts(14.5)), 1.0)
    assert "Tesla T4" in text and "torch" in text and "/kaggle/working" in text and "recommended: train_sdxl.py" in text

"""Scripts as launchers start them: accelerate and torchrun, one process and two; a typo, Ctrl-C, and a process that fails alone."""

import fcntl
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from common.system import launch, stopping

ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.accelerate_cli",
    "launch",
]  # what the command `accelerate launch` runs
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
ALONE = {"RANK": None, "LOCAL_WORLD_SIZE": None, "ACCELERATE_MIXED_PRECISION": None, "TORCHELASTIC_RUN_ID": None}


@pytest.fixture
def begin(root, tmp_path):
    """begin(words): a command in a session of its own, as a terminal has one, with stdout and stderr in `output`."""
    begun = []

    def begin(*words, cwd=None, **environment):
        output = tmp_path / "output"
        port = 29500 + os.getpid() % 1000
        env = {**os.environ, "MASTER_PORT": str(port), "PYTHONPATH": str(root), **environment}
        env.pop("ACCELERATE_USE_CPU", None)
        with output.open("w") as file:
            process = subprocess.Popen(
                list(map(str, words)), cwd=cwd or root, env=env, stdout=file, stderr=file, start_new_session=True
            )
        begun.append(process)
        return SimpleNamespace(
            process=process, pid=process.pid, text=lambda: output.read_text(), lines=lambda: lines_of(output)
        )

    yield begin
    for process in begun:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.wait()


def lines_of(output):
    return [line for line in output.read_text().replace("\r", "\n").splitlines() if line.strip()]


def wait_until(true, what, timeout_s=300):
    """Return when `true()` is; the limit is for a test that would hang, not a claim."""
    ends = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < ends, what
        time.sleep(0.02)


def steps_in(folder):
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def press_twice(run):
    """Ctrl-C as a terminal sends it, to everyone in the foreground, with a finger that trembles."""
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)


# ---------------------------------------------------------------- as it is typed


def test_accelerate_launch_at_768_ends_in_order_and_names_the_command_that_goes_on(begin, root, tmp_path):
    """`accelerate launch train_opt.py --resolution 768`: the launcher dies of a Ctrl-C; the training saves, exits and has the last word."""
    flags = [
        "--demo",
        "--max_train_samples",
        1,
        "--train_batch_size",
        1,
        "--gradient_accumulation_steps",
        1,
        "--cache_dir",
        tmp_path / "c",
    ]
    run = begin(*ACCELERATE, "train_opt.py", "--resolution", 768, *flags, "--output_dir", tmp_path / "my run")
    wait_until(lambda: steps_in(tmp_path / "my run") or run.process.poll() is not None, run.text)
    (script,) = psutil.Process(run.pid).children()
    press_twice(run)
    run.process.wait()
    wait_until(lambda: not psutil.pid_exists(script.pid), "the training has not ended")
    done = steps_in(tmp_path / "my run")[-1]
    assert f"train_opt.py: SIGINT: finishing step {done}, then saving; press again to lose it" in run.lines()
    words = shlex.split(run.lines()[-1].removeprefix("to go on: "))
    assert words[:6] == ["accelerate", "launch", "--quiet", "train_opt.py", "--resolution", "768"]
    assert words[-4:] == ["--output_dir", str(tmp_path / "my run"), "--resume_from_checkpoint", "latest"]
    assert (tmp_path / f"my run/checkpoint-{done:06d}").is_dir()
    assert json.loads((tmp_path / "my run/config.json").read_text())["flags"]["resolution"] == 768


@pytest.mark.parametrize("launcher", [[*ACCELERATE, "--quiet"], TORCHRUN], ids=["accelerate", "torchrun of two"])
def test_a_typo_under_a_launcher_is_said_and_fails(begin, launcher):
    """Once on a line of its own, whatever the number of processes; torchrun adds its report, which ends with the same line."""
    run = begin(*launcher, "train_opt.py", "--demo", "--learning_rat", "1e-3")
    assert run.process.wait() != 0
    said = [
        line
        for line in run.lines()
        if "error: unrecognized arguments: --learning_rat 1e-3; did you mean --learning_rate?" in line
    ]
    assert len([line for line in said if line.startswith("train_opt.py: ")]) == 1
    assert said[-1] in run.lines()[-2:] and "interrupted" not in run.text()
    assert "Traceback" not in run.text() or launcher is TORCHRUN


# ---------------------------------------------------------------- two processes


def test_two_processes_take_the_steps_of_one_and_save_at_a_double_ctrl_c(begin, train, rows_of, tmp_path):
    """As typed, with an effective batch that two cannot share evenly: the same losses, held-out losses and learning rates."""
    flags = [
        "--max_train_steps",
        400,
        "--aspect_ratio_buckets",
        "--random_flip",
        "--caption_dropout",
        0.3,
        "--no_gradient_checkpointing",
    ]
    flags += [
        "--validation_split",
        0.25,
        "--validation_steps",
        2,
        "--train_batch_size",
        3,
        "--gradient_accumulation_steps",
        3,
    ]
    places = ["--demo", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"]
    run = begin(*ACCELERATE, "--multi_gpu", "--num_processes", 2, "train_opt.py", *places, *flags)
    wait_until(lambda: len(steps_in(tmp_path / "run")) >= 2 or run.process.poll() is not None, run.text)
    scripts = psutil.Process(run.pid).children(recursive=True)
    press_twice(run)
    run.process.wait()
    wait_until(lambda: not any(psutil.pid_exists(script.pid) for script in scripts), "a process has not ended")
    rows = rows_of(tmp_path / "run")
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, len(rows) + 1)) and (tmp_path / f"run/checkpoint-{len(rows):06d}").is_dir()
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").exists()
    assert (
        "9 images a step cannot be shared evenly by 2 processes: 1 of them take 5, the others 4; the effective batch stays 9"
        in run.text()
    )
    (told,) = [line for line in run.lines() if line.startswith("to go on: ")]
    assert told.startswith("to go on: accelerate launch --quiet --num_processes 2 train_opt.py --demo")
    alone = train(*flags, prepare=stop_after(len(rows)))
    for name in ("loss", "mse", "grad_norm", "lr", "epoch"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in alone.rows], rel=1e-4), name
    held_out, held_out_alone = ([row["val_loss"] for row in r if "val_loss" in row] for r in (rows, alone.rows))
    assert held_out == pytest.approx(held_out_alone, rel=1e-4) and held_out
    # what the two of them encoded together is one complete cache
    shutil.rmtree(alone.dir)
    cached = train(*flags, "--cache_dir", tmp_path / "cache", into=alone.dir, prepare=stop_after(1))
    assert cached.losses == pytest.approx(alone.losses[:1], rel=1e-4)


def stop_after(steps):
    """For train(prepare=...): a stop is asked for during step `steps`."""

    def prepare(engine, data):
        original = engine.step

        def stepped(current, *rest):
            if current == steps:
                signal.raise_signal(signal.SIGTERM)
            return original(current, *rest)

        engine.step = stepped

    return prepare


ONE_FAILS = """
from common.errors import UserError
from common.cli.running import run

def main():
    from common.model import device
    host = device.start("no")
    if host.rank == 1:
        raise UserError("--x 1: fails here alone")
    host.barrier()

run(main)
"""


def test_a_process_that_fails_alone_ends_the_others_and_is_heard(begin, tmp_path):
    (tmp_path / "one_fails.py").write_text(ONE_FAILS)
    run = begin(*TORCHRUN, tmp_path / "one_fails.py")
    assert run.process.wait() != 0
    assert "one_fails.py: error: --x 1: fails here alone (process 1)" in run.lines()


@pytest.mark.parametrize(
    ("batch", "accumulation", "world", "images", "said"), [(1, 8, 2, 8, None), (4, 1, 2, 4, None), (1, 1, 2, 2, "is 2")]
)
def test_the_effective_batch_does_not_depend_on_the_number_of_processes(
    assemble, batch, accumulation, world, images, said
):
    from dataclasses import replace

    from common.train import run_length

    parts = assemble("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
    assert run_length.run_length(parts.flags, replace(parts.engine.host, world=world), 24).effective_batch == images
    assert said is None or said in run_length.uneven_shares(parts.flags, world, images)


def test_processes_wait_for_one_that_encodes_for_hours(monkeypatch):
    """The library's limit is 10 minutes."""
    from common.model import device

    given = {}
    state = SimpleNamespace(device=device.torch.device("cpu"), process_index=0, num_processes=2)
    monkeypatch.setattr(device, "PartialState", lambda **options: given.update(options) or state)
    device.start("no")
    assert given["timeout"].total_seconds() >= 6 * 3600


# ---------------------------------------------------------------- the command that goes on


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, "python"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch --quiet"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2"},
            "accelerate launch --quiet --num_processes 2",
        ),
        ({"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc_per_node 2"),
    ],
)
def test_the_command_that_goes_on_is_the_one_that_was_typed(monkeypatch, environment, launcher):
    for name, value in {**ALONE, **environment}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    typed = [
        "train_opt.py",
        "--output_dir",
        "my runs/a",
        "--resume-from-checkpoint",
        "latest",
        "--validation_prompt",
        "a cat's hat",
    ]
    command = launch.resuming_command(typed)
    assert command.startswith(f"{launcher} train_opt.py ")
    left = shlex.split(command)[len(launcher.split()) :]
    assert left == [*typed[:3], *typed[5:], "--resume_from_checkpoint", "latest"]
    equal_sign = launch.resuming_command(["train_opt.py", "--resume_from_checkpoint=a", "--demo"])
    assert equal_sign == f"{launcher} train_opt.py --demo --resume_from_checkpoint latest"


# ---------------------------------------------------------------- signals in one process

SLEEPS = """
import common
import sys, time
from common.system import stopping
from common.cli.running import run

def main():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("kept", flush=True)
        open("saved", "w").close()

def listens():
    request = stopping.StopRequest()
    with request.listening():
        request.doing = "finishing step 7, then saving"
        in_a_terminal = sys.stdout.isatty()  # a terminal that is gone is none
        print("begun", flush=True)
        if in_a_terminal:
            while request.reason is None:
                time.sleep(0.01)
            print("saving", flush=True)
            open("saved", "w").close()
        else:
            time.sleep(60)

run(main if sys.argv[1] == "main" else listens)
"""


@pytest.mark.parametrize(
    ("number", "said"), [("SIGINT", "interrupted"), ("SIGTERM", "ended by SIGTERM"), ("SIGHUP", "ended by SIGHUP")]
)
def test_a_signal_before_training_keeps_what_is_done_and_is_one_line(begin, tmp_path, number, said):
    (tmp_path / "script.py").write_text(SLEEPS)
    run = begin(sys.executable, tmp_path / "script.py", "main", cwd=tmp_path)
    wait_until(lambda: "begun" in run.text(), "not begun")
    for _ in range(2):  # the double of a press is the same press
        run.process.send_signal(signal.Signals[number])
    # the second may find the interpreter at its end, where it dies of it; a shell shows the same
    assert run.process.wait() in (128 + signal.Signals[number], -signal.Signals[number])
    assert run.lines() == ["begun", "kept", f"script.py: {said}"]


def test_a_press_is_answered_while_the_main_thread_waits_and_only_a_later_one_ends_the_run(begin, tmp_path):
    (tmp_path / "script.py").write_text(SLEEPS)
    run = begin(sys.executable, tmp_path / "script.py", "listens")
    wait_until(lambda: "begun" in run.text(), "not begun")
    run.process.send_signal(signal.SIGINT)
    wait_until(lambda: "SIGINT" in run.text(), "no answer")
    run.process.send_signal(signal.SIGINT)
    time.sleep(stopping.DOUBLE_PRESS_S + 0.1)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)  # which asks for what is being done already
    time.sleep(0.1)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait() == 130
    answer, last = run.lines()[1:]
    assert answer == "script.py: SIGINT: finishing step 7, then saving; press again to lose it"
    assert last.startswith("script.py: ended at once; --resume_from_checkpoint latest goes on")


@pytest.mark.parametrize("phase", ["main", "listens"])
def test_a_terminal_that_is_closed_does_not_stop_the_saving(root, tmp_path, phase):
    """The terminal sends SIGHUP and is gone: from then on every write to it is an input/output error."""
    (tmp_path / "script.py").write_text(SLEEPS)
    terminal, shell_side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", phase],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path,
        stdin=shell_side,
        stdout=shell_side,
        stderr=shell_side,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(shell_side)
    assert b"begun" in os.read(terminal, 1000)
    os.close(terminal)
    assert process.wait(60) == (129 if phase == "main" else 0)
    assert (tmp_path / "saved").exists()


PIPED = """
import common
import sys, time
from common.system import stopping
from common.cli.running import run

def main():
    request = stopping.StopRequest()
    with request.listening():
        print("begun", flush=True)
        while request.reason is None:
            time.sleep(0.01)
        print("saving", flush=True)
        print("saving", file=sys.stderr, flush=True)
        open("saved", "w").close()

run(main)
"""


def test_a_pipe_whose_reader_is_gone_does_not_stop_the_saving(root, tmp_path):
    """`python train_opt.py 2>&1 | tee log`: a Ctrl-C ends `tee` too, and from then on every write is a broken pipe."""
    (tmp_path / "script.py").write_text(PIPED)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"begun\n"
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("moment", ["import common\n", "import numpy.linalg\n"])
def test_a_ctrl_c_within_the_imports_is_one_line(begin, tmp_path, moment):
    """The first import of a script answers from then on; a library that is cut short while it is imported is not gone on with."""
    waits = tmp_path / "waits.py"
    waits.write_text(
        "import time\nprint('begun', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    print('swallowed', flush=True)\n    raise"
    )
    (tmp_path / "script.py").write_text(
        "import common\nimport waits\n"
        if "common" in moment
        else "from common.cli import running\nrunning.run(lambda: __import__('waits'))"
    )
    run = begin(sys.executable, tmp_path / "script.py")
    wait_until(lambda: "begun" in run.text(), "not begun")
    run.process.send_signal(signal.SIGINT)
    code = run.process.wait()
    assert code % 256 in (130, 256 - signal.SIGINT)  # a shell shows 130 for both
    assert run.lines()[-1] == "script.py: interrupted" and "Traceback" not in run.text()
    assert ("swallowed" in run.text()) == ("common" in moment)


@pytest.mark.parametrize("script", ["train_sdxl", "train_opt", "train_qlora", "train_dora", "infer"])
def test_the_first_thing_a_script_does_is_to_be_ready_for_ctrl_c(root, script):
    imports = [
        line for line in (root / f"{script}.py").read_text().splitlines() if line.startswith(("import ", "from "))
    ]
    assert imports[0].startswith("import common ")

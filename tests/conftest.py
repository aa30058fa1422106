"""One demo of our own for the whole session, trainings in this process, and an engine that can be taken apart.

Imports of torch, diffusers and peft cost seconds, so nearly every training calls `main([...])` here instead of starting Python.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Before torch or common.cli.command_line are imported: they read these once.
CACHE = Path(tempfile.mkdtemp(prefix="sdxl-style-tests-"))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
# Matrices this small lose time to a second thread; `make test-cpus` has two as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(XDG_CACHE_HOME=str(CACHE), HF_HOME=str(CACHE / "hf"), HF_HUB_OFFLINE="1", TINY_DEMO="1")
if not os.environ.get("GPU_TESTS"):  # the same numbers where there is a GPU; `make test-gpu` is for that
    os.environ.update(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
# `nohup make test` has switched off SIGHUP, `make test &` in a script SIGINT, for every process started here too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

# An effective batch of 8 in two passes; checkpointing of activations costs time and is compared on its own.
DEMO = ["--demo", "--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--no_gradient_checkpointing"]
HEAVY = {"torch", "diffusers", "transformers", "peft", "numpy"}  # seconds to import
CLOCKS = {"s_per_img", "peak_gib", "seconds"}  # the fields of a metrics row that may differ between equal runs


class Run(SimpleNamespace):
    """What a training left behind: `dir` (Path), `rows` of metrics.jsonl, `result` of main."""

    @property
    def losses(self):
        return [row["loss"] for row in self.rows]

    @property
    def numbers(self):
        """The rows without what depends on the clock."""
        return [{key: value for key, value in row.items() if key not in CLOCKS} for row in self.rows]

    def weights(self, name="pytorch_lora_weights.safetensors"):
        from safetensors.torch import load_file

        return load_file(self.dir / name)

    def same_weights(self, other, name="pytorch_lora_weights.safetensors"):
        """Whether two runs wrote the same bits."""
        import torch

        a, b = self.weights(name), other.weights(name)
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def read_rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def rows_of():
    return read_rows


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """train(*flags, into=folder, script="train_opt", prepare=f): run a trainer's main with --demo -> Run.

    `prepare(engine, data)` is called on the finished assembly, before the first step.
    """

    def train(*flags, into=None, script="train_opt", prepare=None):
        from common.train import assembly

        folder = into or tmp_path_factory.mktemp("run")
        module = __import__(script)
        with pytest.MonkeyPatch.context() as patch:
            if prepare is not None:
                original = assembly.train

                def prepared(flags, engine, data, *rest):
                    prepare(engine, data)
                    return original(flags, engine, data, *rest)

                patch.setattr(assembly, "train", prepared)
            result = module.main([*DEMO, "--output_dir", str(folder), *map(str, flags)])
        return Run(dir=Path(folder), rows=read_rows(folder), result=result)

    return train


@pytest.fixture(scope="session")
def assemble(tmp_path_factory):
    """assemble(*flags): everything a trainer's main puts together, untrained -> namespace(flags, engine, data)."""

    def assemble(*flags, script="train_opt"):
        from common.train import assembly

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                assembly,
                "train",
                lambda flags, engine, data, *rest: SimpleNamespace(flags=flags, engine=engine, data=data),
            )
            return __import__(script).main(
                [*DEMO, "--output_dir", str(tmp_path_factory.mktemp("parts")), *map(str, flags)]
            )

    return assemble


@pytest.fixture(scope="session")
def demo():
    """(model folder, data folder) of the demo."""
    from common.cli import command_line
    from common.model.tiny import demo_assets

    model, data = demo_assets(Path(command_line.CACHE_DIR) / "demo")
    return SimpleNamespace(model=model, data=data)


@pytest.fixture(scope="session")
def fresh(demo):
    """fresh(): the demo's pipeline as plain diffusers loads it, read once and copied."""
    import copy

    import torch
    from diffusers import StableDiffusionXLPipeline

    loaded = StableDiffusionXLPipeline.from_pretrained(demo.model)

    def fresh():
        parts = {
            name: copy.deepcopy(part) if isinstance(part, torch.nn.Module) else part
            for name, part in loaded.components.items()
        }
        pipeline = StableDiffusionXLPipeline(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return fresh


@pytest.fixture(scope="session")
def plain(train):
    """train_opt as it is, for 4 steps: what other runs are compared with."""
    return train("--max_train_steps", 4)


@pytest.fixture
def few_steps(monkeypatch):
    """Validation images of 4 denoising steps instead of 30."""
    from common.render import validation_images

    monkeypatch.setattr(validation_images, "STEPS", 4)


@pytest.fixture
def start():
    """start(*arguments, **environment): a script as a user runs it -> Popen with text pipes. Whatever is left is killed at the end."""
    started = []

    def start(*arguments, cwd=None, **environment):
        env = {**os.environ, **environment}
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def answer(start):
    """answer(script, *arguments): what it says -> (exit status, stdout, stderr), and it has imported nothing heavy for that."""

    def answer(*arguments, **options):
        process = start("-X", "importtime", *arguments, **options)
        out, err = process.communicate(timeout=3600)
        lines = err.splitlines(keepends=True)
        imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
        assert imported and not imported & HEAVY
        return process.returncode, out, "".join(line for line in lines if not line.startswith("import time:"))

    return answer


@pytest.fixture
def files_in():
    """files_in(folder): {relative path: bytes} of everything below it."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }

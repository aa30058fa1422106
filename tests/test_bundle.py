"""One-file scripts and notebooks: up to date, whole, and running alone in an empty folder."""

import inspect
import json
import os
import subprocess
import sys
import time

import pytest

from common import noise
from tools import bundle


def alone(folder, script, *arguments, **environment):
    """Run a bundle as in a fresh kernel: nothing beside it, nothing from the user's site -> CompletedProcess."""
    (folder / f"{script}.py").write_text((bundle.DIST / f"{script}.py").read_text())
    command = [sys.executable, "-I", f"{script}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def test_dist_is_what_the_sources_make():
    assert bundle.stale() == [], "run python tools/bundle.py"


@pytest.mark.parametrize("script", bundle.SCRIPTS)
def test_help_is_the_scripts_own_and_needs_no_torch(script, root, tmp_path):
    started = time.monotonic()
    bundled = alone(tmp_path, script, "--help", COLUMNS="200")
    assert time.monotonic() - started < 1.5
    own = subprocess.run(
        [sys.executable, root / f"{script}.py", "--help"], env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True
    )
    assert bundled.returncode == 0 and bundled.stdout == own.stdout


@pytest.mark.parametrize("script", bundle.SCRIPTS)
def test_every_module_is_in_it_as_it_stands_in_the_repository(script, root):
    text = (bundle.DIST / f"{script}.py").read_text()
    names = bundle.modules_of((root / f"{script}.py").read_text())
    assert {"common", "common.flags", "common.loading", "demo.build"} <= set(names) and "demo.world" not in names
    assert all((root / bundle.path_of(name)).read_text() in text for name in names)


def test_it_trains_and_compares_alone_in_an_empty_folder(tmp_path):
    trained = alone(tmp_path, "train_opt", "--demo", "--max_train_steps", 2, "--output_dir", "run")
    assert trained.returncode == 0, trained.stderr
    compared = alone(tmp_path, "infer", "--demo", "--compare", "--lora", "run", "--steps", 2, "--output_dir", "grid")
    assert compared.returncode == 0 and (tmp_path / "grid" / "compare.png").exists(), compared.stderr


def test_a_traceback_and_inspect_see_the_modules_lines(tmp_path):
    """Triton reads the source of its kernels, and users read tracebacks."""
    (tmp_path / "probe.py").write_text(
        (bundle.DIST / "infer.py").read_text().partition("\nif __name__")[0]
        + "\nimport inspect\nfrom common import noise\nprint(inspect.getsource(noise.mse_per_sample))\nnoise.mse_per_sample(1, 2)\n"
    )
    process = subprocess.run([sys.executable, "-I", "probe.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "def mse_per_sample(prediction, target):" in process.stdout
    line = inspect.getsourcelines(noise.mse_per_sample)[1] + 2
    assert f'common/noise.py", line {line}, in mse_per_sample' in process.stderr


@pytest.mark.parametrize("script", bundle.SCRIPTS)
def test_notebooks_hold_the_bundle_and_the_documented_flags(script):
    cells = json.loads((bundle.DIST / f"{script}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert f"%%writefile {script}.py\n{bundle.bundle(script)}" in sources
    (install,) = (source for source in sources if "%pip install" in source)
    assert '"diffusers>=' in install and "torch" not in install.replace("# the installed torch is kept", "")
    assert any("display(Image(" in source for source in sources) and len({cell["id"] for cell in cells}) == len(cells)
    assert bundle.RUNS[script][2] in "".join(sources)


def test_three_single_quotes_are_refused(tmp_path, monkeypatch):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "odd.py").write_text("x = '''text'''\n")
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="common/odd.py"):
        bundle.text_of("common.odd")

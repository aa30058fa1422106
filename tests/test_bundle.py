"""One-file scripts and notebooks: up to date, whole, and running alone in an empty folder."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest

from common import noise, packages
from tools import bundle, notebooks, one_file


def alone(folder, script, *arguments, **environment):
    """Run a bundle as in a fresh kernel: nothing beside it, nothing from the user's site -> CompletedProcess."""
    (folder / f"{script}.py").write_text(bundle.bundle(script))
    command = [sys.executable, "-I", f"{script}.py", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=3600
    )


def test_dist_is_what_the_sources_make():
    assert bundle.stale() == [], "run python tools/bundle.py"


@pytest.mark.parametrize("script", bundle.SCRIPTS)
def test_help_is_the_scripts_own_and_needs_no_torch(script, root, tmp_path, answer):
    bundled = tmp_path / f"{script}.py"
    bundled.write_text(bundle.bundle(script))
    status, said, errors = answer("-I", bundled, "--help", cwd=tmp_path, COLUMNS="200")
    assert (status, errors) == (0, "") and answer(root / f"{script}.py", "--help", COLUMNS="200") == (0, said, "")


@pytest.mark.parametrize("script", notebooks.SUBJECTS)
def test_every_module_is_in_it_as_it_stands_in_the_repository(script, root):
    text = bundle.bundle(script)
    names = one_file.modules_of((root / f"{script}.py").read_text())
    assert {"common", "common.flags", "common.loading", "common.tiny"} <= set(names)
    assert not any(name.partition(".")[0] == "demo" for name in names)
    assert all((root / one_file.path_of(name)).read_text() in text for name in names)


def test_it_trains_and_compares_alone_in_an_empty_folder(tmp_path):
    trained = alone(tmp_path, "train_opt", "--demo", "--max_train_steps", 2, "--output_dir", "run")
    assert trained.returncode == 0, trained.stderr
    compared = alone(tmp_path, "infer", "--demo", "--compare", "--lora", "run", "--steps", 2, "--output_dir", "grid")
    assert compared.returncode == 0 and (tmp_path / "grid" / "compare.png").exists(), compared.stderr


def test_a_traceback_and_inspect_see_the_modules_lines(tmp_path):
    """Triton reads the source of its kernels, and users read tracebacks."""
    (tmp_path / "probe.py").write_text(
        bundle.bundle("infer").partition("\nif __name__")[0]
        + "\nimport inspect\nfrom common import noise\nprint(inspect.getsource(noise.mse_per_sample))\nnoise.mse_per_sample(1, 2)\n"
    )
    process = subprocess.run([sys.executable, "-I", "probe.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "def mse_per_sample(prediction, target):" in process.stdout
    line = inspect.getsourcelines(noise.mse_per_sample)[1] + 2
    assert f'common/noise.py", line {line}, in mse_per_sample' in process.stderr


# ---------------------------------------------------------------- notebooks


def sources(script):
    """The cells of a notebook: [(text, metadata)]."""
    cells = json.loads(notebooks.notebook(script))["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    return [("".join(cell["source"]), cell["metadata"]) for cell in cells]


@pytest.mark.parametrize("script", notebooks.SUBJECTS)
def test_settings_come_first_and_files_before_the_commands_that_need_them_folded(script):
    cells = sources(script)
    assert cells[1][0].startswith("# @title Settings\n") and notebooks.SUBJECTS[script].flags in cells[1][0]
    written = [text.split()[1] for text, _ in cells if text.startswith("%%writefile")]
    assert written == ["suite_modules.py", "verify_setup.py", *dict.fromkeys([f"{script}.py", "infer.py"])]
    for i, (text, metadata) in enumerate(cells):
        if text.startswith("%%writefile"):
            assert metadata == notebooks.FOLDED
        elif "run(*" in text and "def run" not in text:
            assert i > max(j for j, (other, _) in enumerate(cells) if other.startswith("%%writefile"))


@pytest.mark.parametrize("script", notebooks.SUBJECTS)
def test_texts_and_commands_name_only_flags_that_the_scripts_have(script, root):
    """Of the script that a command calls; a text may name those of any."""
    helps = {name: alone_help(root, name) for name in {script, "infer"}}
    for text, metadata in sources(script):
        if metadata == notebooks.FOLDED or '"pip", "install"' in text:
            continue
        flags = re.findall(r"(?<![\w-])--[a-z]\w+", re.sub("`pip [^`]*`", "", text))
        called = re.findall(r'run\(\*\w+, "(\w+)\.py"', text)
        known = helps[called[0]] if called and called[0] in helps else "".join(helps.values())
        assert all(re.search(rf"{flag}\b", known) for flag in flags), (flags, text)


def alone_help(root, script):
    return subprocess.run([sys.executable, root / f"{script}.py", "--help"], capture_output=True, text=True).stdout


def test_the_install_line_asks_for_everything_but_torch():
    assert notebooks.requirements() == [
        name + wanted for name, wanted in packages.REQUIREMENTS.items() if name != "torch"
    ]


def test_a_notebooks_scripts_run_from_their_cells(tmp_path):
    """The script with its one line more, beside the file with the modules."""
    for text, _ in sources("infer"):
        if text.startswith("%%writefile"):
            first, _, rest = text.partition("\n")
            (tmp_path / first.split()[1]).write_text(rest)
    process = subprocess.run(
        [sys.executable, "infer.py", "--demo", "--dry_run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0 and json.loads(process.stdout)["output_dir"] == "outputs/demo", process.stderr


# ---------------------------------------------------------------- what goes into one file


def test_a_module_brings_its_packages_the_outer_and_the_inner_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(one_file, "ROOT", tmp_path)
    for name in ("common/__init__", "common/data/__init__", "common/data/store", "common/files"):
        (tmp_path / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(
            "from common.files import write\n" if name.endswith("data/__init__") else "write = 1\n"
        )
    (tmp_path / "probe.py").write_text('"""Probe."""\nfrom common.data.store import write\n\nprint(write)\n')
    assert one_file.modules_of((tmp_path / "probe.py").read_text()) == [
        "common",
        "common.data",
        "common.data.store",
        "common.files",
    ]
    text = one_file.bundle("probe")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/probe.py").write_text(text)
    process = subprocess.run([sys.executable, "-I", tmp_path / "alone/probe.py"], capture_output=True, text=True)
    assert process.stdout == "1\n", process.stderr


def test_three_single_quotes_are_refused(tmp_path, monkeypatch):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "odd.py").write_text("x = '''text'''\n")
    monkeypatch.setattr(one_file, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="common/odd.py"):
        one_file.text_of("common.odd")

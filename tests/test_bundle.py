"""One-file scripts and notebooks: up to date, whole, and running alone in an empty folder."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from common.model import noise
from common.system import packages
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
    assert {"common", "common.cli.flags", "common.model.loading", "common.model.tiny"} <= set(names)
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
        + "\nimport inspect\nfrom common.model import noise\n"
        + "print(inspect.getsource(noise.mse_per_sample))\nnoise.mse_per_sample(1, 2)\n"
    )
    process = subprocess.run([sys.executable, "-I", "probe.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "def mse_per_sample(prediction: torch.Tensor" in process.stdout
    line = inspect.getsourcelines(noise.mse_per_sample)[1] + 2
    assert f'common/model/noise.py", line {line}, in mse_per_sample' in process.stderr


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


@pytest.mark.parametrize(
    ("prompts", "passed"), [([], []), (["a fox, red", "two cats"], ["--prompt", "a fox, red", "two cats"])]
)
def test_prompts_of_the_settings_stand_beside_the_flags(prompts, passed, tmp_path, monkeypatch):
    """Each as one argument; without any infer.py has its own."""
    monkeypatch.chdir(tmp_path)
    settings = sources("infer")[1][0]
    (command,) = [text for text, _ in sources("infer") if 'run(*PYTHON, "infer.py"' in text]
    ran = []
    names = dict(os=os, shlex=shlex, DEMO=False, OUTPUT="out", PYTHON=["python"], run=lambda *line: ran.append(line))
    exec(settings, names)
    assert names["PROMPTS"] == []
    names["PROMPTS"] = prompts
    exec(command, names)
    assert ran == [("python", "infer.py", "--compare", *passed, "--output_dir", "out/compare")]


# ---------------------------------------------------------------- what goes into one file


WINGS = {  # a small suite whose package has packages inside
    "common/__init__.py": '"""The suite."""\n',
    "common/files.py": "def write():\n    return 'written'\n",
    "common/unused.py": "raise SystemExit('nobody imports it')\n",
    "common/cli/__init__.py": '"""Answers before anything heavy."""\n',
    "common/cli/flags.py": "from common import files\n\nNAME = __name__\nWROTE = files.write()\n",
    "common/cli/help.py": "from . import flags\nfrom .flags import NAME\n\nHELP = f'{flags.NAME} {NAME}'\n",
    "common/data/__init__.py": "from common.cli import help\n\nTITLE = help.HELP\n",
    "common/data/store.py": "def fail():\n    raise ValueError('in the store')\n",
    "common/alone/__init__.py": "ALONE = __path__ is not None\n",
}
PROBE = '''"""Probe."""

import importlib
import inspect
import os
import traceback

import common.cli.flags
import common.cli.help as helped
from common.alone import ALONE
from common.cli import flags
from common.data import TITLE


def main():
    from common.data.store import fail

    print(common.cli.flags is flags, flags.WROTE, helped.HELP == TITLE, ALONE)
    print(flags.__package__, importlib.import_module("common.data").__package__, common.cli.__doc__)
    print(inspect.getsource(fail).splitlines()[0])
    try:
        fail()
    except ValueError:
        here = os.path.dirname(os.path.abspath(__file__))
        print(traceback.format_exc().splitlines()[-3].strip().replace(here, "HERE"))


if __name__ == "__main__":
    main()
'''
SAID = [
    "True written True True",
    "common.cli common.data Answers before anything heavy.",
    "def fail():",
    'File "HERE/common/data/store.py", line 2, in fail',
]


@pytest.fixture
def wings(tmp_path, monkeypatch):
    """A repository of its own with the files of WINGS and probe.py -> its folder."""
    for name, text in {**WINGS, "probe.py": PROBE}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(one_file, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    return tmp_path


def test_a_module_brings_its_packages_the_outer_and_the_inner_ones(wings):
    """However it is imported, and nothing that is not."""
    names = [
        "common",
        "common.alone",
        "common.cli",
        "common.cli.flags",
        "common.cli.help",
        "common.data",
        "common.data.store",
        "common.files",
    ]
    assert one_file.modules_of(PROBE) == names
    assert one_file.modules_of("from common.data.store import fail\n") == [n for n in names if n != "common.alone"]


def said_by(folder):
    process = subprocess.run([sys.executable, "-I", "probe.py"], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_packages_inside_of_packages_run_from_one_file_as_from_folders(wings):
    alone = wings / "alone"
    alone.mkdir()
    (alone / "probe.py").write_text(one_file.bundle("probe"))
    assert said_by(alone) == SAID
    from_folders = subprocess.run([sys.executable, "probe.py"], cwd=wings, capture_output=True, text=True)
    assert from_folders.stdout.splitlines() == SAID, from_folders.stderr


def test_packages_inside_of_packages_run_from_a_notebooks_cells(wings):
    cells = wings / "cells"
    cells.mkdir()
    for text in (notebooks.modules_cell(["probe"]), notebooks.script_cell("probe")):
        first, _, rest = text.partition("\n")
        (cells / first.split()[1]).write_text(rest)
    process = subprocess.run([sys.executable, "probe.py"], cwd=cells, capture_output=True, text=True)
    assert process.stdout.splitlines() == SAID, process.stderr


def test_three_single_quotes_are_refused(tmp_path, monkeypatch):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "odd.py").write_text("x = '''text'''\n")
    monkeypatch.setattr(one_file, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="common/odd.py"):
        one_file.text_of("common.odd")

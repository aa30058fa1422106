"""A notebook for each script: settings first, then the files it needs in folded cells, then the commands.

A cell that is folded says so to each host in its own word: Jupyter reads jupyter.source_hidden, Kaggle _kg_hide-input, Colab
cellView. The files stand before the commands because "run all" goes from top to bottom. They are the script as it stands in the
repository and one file with all modules, which the scripts share.
"""

import json
import os
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

from tools.one_file import IMPORTS, ROOT, modules_of, source_of, split_docstring, texts_of

CELLS = Path(__file__).with_name("cells")
MODULES_FILE = "suite_modules"
FOLDED = {"jupyter": {"source_hidden": True}, "_kg_hide-input": True, "cellView": "form", "collapsed": False}
TIMEOUT_S = 900  # of one cell of a notebook in its --demo form


class Subject(NamedTuple):
    """What a notebook is about."""

    what: str
    needs: str
    flags: str  # of the documented run
    pictures: tuple[str, ...]  # patterns below the output folder


def training(script: str, what: str, needs: str, flags: str) -> Subject:
    return Subject(what, needs, flags, (f"{script}/training.png", f"{script}/samples/*.png", "compare/compare.png"))


SUBJECTS = {
    "train_sdxl": training(
        "train_sdxl", "LoRA at 1024 px, the best quality.", "a GPU with 14 GB", "--max_train_minutes 600"
    ),
    "train_opt": training(
        "train_opt",
        "LoRA at 768 px with Min-SNR, offset noise and EMA.",
        "a GPU with 8 to 12 GB",
        "--resolution 768 --max_train_minutes 600",
    ),
    "train_qlora": training(
        "train_qlora",
        "LoRA on a 4-bit base, the least memory.",
        "a GPU with 4 GB or more",
        "--strategy aggressive --max_train_minutes 600",
    ),
    "train_dora": training("train_dora", "Weight-decomposed LoRA.", "a GPU with 8 to 12 GB", "--max_train_minutes 600"),
    "infer": Subject(
        "The base model and every adapter side by side.",
        "a GPU with 8 GB or more",
        "--compare",
        ("compare/images/*.png", "compare/compare.png"),
    ),
}
OFFLINE = (
    "**Without internet** (a Kaggle notebook with it switched off): attach the model as a folder in the layout of diffusers, for training"
    " your captioned pictures, and the two wheels of `pip download --no-deps argparse-dataclass bitsandbytes`. The first cell of commands"
    " finds the wheels, and the scripts take the model and the pictures from `/kaggle/input` when the hub is out of reach."
)
SESSIONS = (
    "**A session that ends** costs nothing: run all again, and the run goes on from its last checkpoint. Interrupt the cell to stop early;"
    " the step in hand is finished and saved. On Kaggle attach the output of the earlier version; on Colab it is on your Drive."
)


TRAIN = """ARGUMENTS = ["--demo"] if DEMO else shlex.split(FLAGS)
if TRAIN_DATA_DIR:
    ARGUMENTS += ["--train_data_dir", TRAIN_DATA_DIR]
ARGUMENTS += ["--output_dir", f"{OUTPUT}/SCRIPT", "--resume_from_checkpoint", "latest"]
run(*LAUNCH, "SCRIPT.py", *ARGUMENTS)"""
COMPARE = """ARGUMENTS = ["--demo"] if DEMO else []
ARGUMENTS += ["--lora", f"{OUTPUT}/SCRIPT", "--output_dir", f"{OUTPUT}/compare"]
run(*PYTHON, "infer.py", "--compare", *ARGUMENTS)"""
DRAW = """import glob

ARGUMENTS = ["--demo", "--prompt", "a laughing boy"] if DEMO else shlex.split(FLAGS)
RUNS = [os.path.dirname(file) for file in sorted(glob.glob(f"{OUTPUT}/*/pytorch_lora_weights.safetensors"))]
for adapter in shlex.split(ADAPTERS) or RUNS:
    ARGUMENTS += ["--lora", adapter]
run(*PYTHON, "infer.py", *ARGUMENTS, "--output_dir", f"{OUTPUT}/compare")"""


def notebook(script: str) -> str:
    """The text of dist/SCRIPT.ipynb."""
    subject = SUBJECTS[script]
    trains = script != "infer"
    scripts = ["verify_setup", *dict.fromkeys([script, "infer"])]
    cells = [
        markdown(
            f"# {script}.py\n\n{subject.what} Needs {subject.needs}. Choose the GPU, look at the settings, run all cells."
            " It loads 7 GB from the hub; without internet see the end."
        ),
        code(trainer_settings(subject) if trains else infer_settings(subject)),
        folded((CELLS / "machine.py").read_text()),
        folded((CELLS / "run.py").read_text()),
        folded(modules_cell(scripts)),
        *(folded(script_cell(name)) for name in scripts),
        code(install_cell()),
        markdown("What is this machine good for? (It says so, and stops nothing.)"),
        code('try:\n    run(*PYTHON, "verify_setup.py")\nexcept subprocess.CalledProcessError:\n    pass'),
    ]
    if trains:
        cells += [
            markdown(f"Train. All flags: `!python {script}.py --help`"),
            code(TRAIN.replace("SCRIPT", script)),
            markdown("Draw with the base model and with the adapter: the same prompts, the same noise."),
            code(COMPARE.replace("SCRIPT", script)),
        ]
    else:
        cells += [code(DRAW)]
    cells += [
        code(pictures_cell(subject)),
        markdown(f"{SESSIONS}\n\n{OFFLINE}" if trains else OFFLINE),
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:02d}"
    kernel = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return (
        json.dumps(
            {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False
        )
        + "\n"
    )


# ---------------------------------------------------------------- cells


def trainer_settings(subject: Subject) -> str:
    return f'''# @title Settings
FLAGS = "{subject.flags}"  # @param {{type:"string"}}
# @markdown Your own captioned pictures: a folder with metadata.jsonl or .csv, or a .txt beside each. Empty: Naruto.
TRAIN_DATA_DIR = ""  # @param {{type:"string"}}
# @markdown On Colab: write everything to your Drive, where it outlives the session.
USE_DRIVE = True  # @param {{type:"boolean"}}'''


def infer_settings(subject: Subject) -> str:
    return f'''# @title Settings
FLAGS = "{subject.flags}"  # @param {{type:"string"}}
# @markdown Adapters, with spaces between, e.g. /kaggle/input/my-run/train_opt:0.8. Empty: every run in the output folder.
ADAPTERS = ""  # @param {{type:"string"}}
# @markdown On Colab: write everything to your Drive, where it outlives the session.
USE_DRIVE = True  # @param {{type:"boolean"}}'''


def install_cell() -> str:
    title, _, rest = (CELLS / "install.py").read_text().partition("\n")
    wanted = textwrap.fill(" ".join(requirements()), 100, break_on_hyphens=False)
    return f'{title}\nREQUIREMENTS = """\n{wanted}\n""".split()\n{rest}'


def pictures_cell(subject: Subject) -> str:
    title, _, rest = (CELLS / "pictures.py").read_text().partition("\n")
    return f"{title}\nPICTURES = {json.dumps(subject.pictures)}\n{rest}"


def modules_cell(scripts: list[str]) -> str:
    names = modules_of(*map(source_of, scripts))
    made = (
        f"The {len(names)} modules that the scripts import. Made by tools/bundle.py; edit the modules, not this text."
    )
    return f"%%writefile {MODULES_FILE}.py\n# @title {MODULES_FILE}.py\n# {made}\n\n{IMPORTS}\n\n{texts_of(names)}"


def script_cell(script: str) -> str:
    """A script as it stands, but for one line that brings its modules."""
    doc, body = split_docstring(source_of(script))
    return f"%%writefile {script}.py\n# @title {script}.py\n{doc}\n\nimport {MODULES_FILE}  # noqa: F401  (common/)\n{body}"


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}


def code(text: str) -> dict:
    source = text.rstrip("\n").splitlines(keepends=True)
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source}


def folded(text: str) -> dict:
    return {**code(text), "metadata": FOLDED}


def requirements() -> list[str]:
    """The packages of requirements.txt with their ranges, torch left out."""
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "torch>"))]


# ---------------------------------------------------------------- a notebook, run


def execute(script: str, keep: Path | None = None) -> list[str]:
    """Run a notebook's --demo form with this Python as its kernel, in an empty folder -> its PNG pictures, as base64 texts.

    With `keep`, a folder, the notebook is written there with its outputs.
    """
    import nbformat
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(SUITE_DEMO="1", XDG_CACHE_HOME=f"{folder}/cache", ACCELERATE_USE_CPU="true")
        source = nbformat.reads(notebook(script), 4)
        done = NotebookClient(source, timeout=TIMEOUT_S, resources={"metadata": {"path": folder}}).execute()
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        nbformat.write(done, keep / f"{script}.ipynb")
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]

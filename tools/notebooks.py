"""A notebook for each script: settings first, then the files it needs in folded cells, then the commands.

A cell that is folded says so to each host in its own word: Jupyter reads jupyter.source_hidden, Kaggle _kg_hide-input,
Colab cellView. The files stand before the commands because "run all" goes from top to bottom. They are the script as it
stands in the repository and one file with all modules, which the scripts share.
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
    card_gb: int  # the smallest card on which it runs
    flags: str  # of the documented run


TIME_LIMIT = "--max_train_minutes 600"  # Kaggle ends a session after 12 hours
SUBJECTS = {
    "train_sdxl": Subject("LoRA at 1024 px, the best quality.", 8, TIME_LIMIT),
    "train_opt": Subject("LoRA at 768 px with Min-SNR, offset noise and EMA.", 8, f"--resolution 768 {TIME_LIMIT}"),
    "train_qlora": Subject("LoRA on a 4-bit base, the least memory.", 6, f"--strategy aggressive {TIME_LIMIT}"),
    "train_dora": Subject("Weight-decomposed LoRA.", 8, TIME_LIMIT),
    "infer": Subject("The base model and every adapter side by side.", 8, "--compare"),
}

# What lies in /kaggle/input when the hub is out of reach
OFFLINE = (
    "**Without internet** (a Kaggle notebook with it switched off): attach {attached}, and the two wheels of"
    " `pip download --no-deps argparse-dataclass bitsandbytes`. The first cell of commands finds the wheels, and the"
    " scripts take {taken} from `/kaggle/input` when the hub is out of reach."
)
MODEL = "the model as a folder in the layout of diffusers"
OFFLINE_TRAINING = OFFLINE.format(attached=f"{MODEL}, your captioned pictures", taken="the model and the pictures")
OFFLINE_INFER = OFFLINE.format(attached=MODEL, taken="the model")
SESSIONS = (
    "**A session that ends** costs nothing: run all again, and the run goes on from its last checkpoint. Interrupt the"
    " cell to stop early; the step in hand is finished and saved. On Kaggle attach the output of the earlier version;"
    " on Colab it is on your Drive."
)

# Settings, which Colab shows as a form
TRAINING_SETTINGS = """# @title Settings
# @markdown Flags of SCRIPT.py as on a command line, e.g. `--learning_rate 5e-5 --lora_rank 32 --seed 7`; all of them:
# @markdown `!python SCRIPT.py --help`, once the cells below have run. `--max_train_minutes 600` ends the run after
# @markdown 10 hours with everything saved, because Kaggle stops a session after 12; run all again to go on.
FLAGS = "DEFAULTS"  # @param {type:"string"}
# @markdown Your own captioned pictures: a folder with metadata.jsonl or .csv, or a .txt beside each. Empty: Naruto.
TRAIN_DATA_DIR = ""  # @param {type:"string"}"""
INFER_SETTINGS = """# @title Settings
# @markdown What to show, each in quotes, e.g. `["a fox in Naruto style", "a cat"]`. Empty: the reference prompts.
PROMPTS = []  # @param {type:"raw"}
# @markdown Other flags of infer.py as on a command line, e.g. `--compare --num_images 2 --seed 7 --steps 20`.
FLAGS = "DEFAULTS"  # @param {type:"string"}
# @markdown Adapters, with spaces between, e.g. /kaggle/input/run/train_opt:0.8. Empty: every run in the output folder.
ADAPTERS = ""  # @param {type:"string"}"""
DRIVE_SETTING = """
# @markdown On Colab: write everything to your Drive, where it outlives the session.
USE_DRIVE = True  # @param {type:"boolean"}"""

# Commands
VERIFY = """try:
    run(*PYTHON, "verify_setup.py")
except subprocess.CalledProcessError:
    pass"""
TRAIN = """ARGUMENTS = ["--demo"] if DEMO else shlex.split(FLAGS)
if TRAIN_DATA_DIR:
    ARGUMENTS += ["--train_data_dir", TRAIN_DATA_DIR]
ARGUMENTS += ["--output_dir", f"{OUTPUT}/SCRIPT", "--resume_from_checkpoint", "latest"]
run(*LAUNCH, "SCRIPT.py", *ARGUMENTS)"""
COMPARE = """ARGUMENTS = ["--demo"] if DEMO else []
ARGUMENTS += ["--lora", f"{OUTPUT}/SCRIPT", "--output_dir", f"{OUTPUT}/compare"]
run(*PYTHON, "infer.py", "--compare", *ARGUMENTS)"""
RENDER = """import glob

ARGUMENTS = ["--demo"] if DEMO else shlex.split(FLAGS)
if PROMPTS:
    ARGUMENTS += ["--prompt", *PROMPTS]
RUNS = [os.path.dirname(file) for file in sorted(glob.glob(f"{OUTPUT}/*/pytorch_lora_weights.safetensors"))]
for adapter in shlex.split(ADAPTERS) or RUNS:
    ARGUMENTS += ["--lora", adapter]
run(*PYTHON, "infer.py", *ARGUMENTS, "--output_dir", f"{OUTPUT}/compare")"""


def notebook(script: str) -> str:
    """The text of dist/SCRIPT.ipynb."""
    cells = [*preparing_cells(script), *commands(script)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:02d}"
    kernel = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    whole = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def preparing_cells(script: str) -> list[dict]:
    """What it is about, settings, files, packages, and a look at the machine."""
    subject = SUBJECTS[script]
    scripts = ["verify_setup", *dict.fromkeys([script, "infer"])]
    advice = "Choose the GPU, look at the settings, run all cells."
    hub = "It loads 7 GB from the hub; without internet see the end."
    return [
        markdown(f"# {script}.py\n\n{subject.what} Needs a GPU with {subject.card_gb} GB or more. {advice} {hub}"),
        code(settings_cell(script)),
        # The files
        folded((CELLS / "machine.py").read_text()),
        folded((CELLS / "run.py").read_text()),
        folded(modules_cell(scripts)),
        *(folded(script_cell(name)) for name in scripts),
        # The machine
        code(install_cell()),
        markdown("What is this machine good for? (It says so, and stops nothing.)"),
        code(VERIFY),
    ]


def commands(script: str) -> list[dict]:
    """Train and compare, or render; then show the pictures."""
    pictures = code(pictures_cell(script))
    if script == "infer":
        return [code(RENDER), pictures, markdown(OFFLINE_INFER)]
    return [
        markdown(f"Train. All flags: `!python {script}.py --help`"),
        code(TRAIN.replace("SCRIPT", script)),
        markdown("Render with the base model and with the adapter: the same prompts, the same noise."),
        code(COMPARE.replace("SCRIPT", script)),
        pictures,
        markdown(f"{SESSIONS}\n\n{OFFLINE_TRAINING}"),
    ]


# ---------------------------------------------------------------- cells


def settings_cell(script: str) -> str:
    settings = INFER_SETTINGS if script == "infer" else TRAINING_SETTINGS.replace("SCRIPT", script)
    return settings.replace("DEFAULTS", SUBJECTS[script].flags) + DRIVE_SETTING


def install_cell() -> str:
    title, _, rest = (CELLS / "install.py").read_text().partition("\n")
    wanted = textwrap.fill(" ".join(requirements()), 100, break_on_hyphens=False)
    return f'{title}\nREQUIREMENTS = """\n{wanted}\n""".split()\n{rest}'


def pictures_cell(script: str) -> str:
    """Shows those of the run and of the comparison."""
    title, _, rest = (CELLS / "pictures.py").read_text().partition("\n")
    own = ["compare/images/*.png"] if script == "infer" else [f"{script}/training.png", f"{script}/samples/*.png"]
    return f"{title}\nPICTURES = {json.dumps([*own, 'compare/compare.png'])}\n{rest}"


def modules_cell(scripts: list[str]) -> str:
    names = modules_of(*map(source_of, scripts))
    use = "Made by tools/bundle.py; edit the modules, not this text."
    made = f"# The {len(names)} modules that the scripts import. {use}"
    return f"{file_cell(MODULES_FILE)}{made}\n\n{IMPORTS}\n\n{texts_of(names)}"


def script_cell(script: str) -> str:
    """A script as it stands, but for one line that brings its modules."""
    doc, body = split_docstring(source_of(script))
    return f"{file_cell(script)}{doc}\n\nimport {MODULES_FILE}  # noqa: F401  (common/)\n{body}"


def file_cell(name: str) -> str:
    """How a cell begins that writes NAME.py."""
    return f"%%writefile {name}.py\n# @title {name}.py\n"


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
    """Run a notebook's --demo form with this Python as its kernel, in an empty folder -> its PNG pictures in base64.

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

"""One-file scripts and notebooks for Kaggle and Colab: dist/SCRIPT.py and dist/SCRIPT.ipynb.

    python tools/bundle.py              # write dist/
    python tools/bundle.py --check      # exit 1 when dist/ is not what the sources make
    python tools/bundle.py --execute    # run every notebook for real, in its --demo form, in an empty folder (minutes; needs nbclient)

A bundle holds the modules that its script imports, each as it stands in the repository, comments and all, as a text of its own, and
thirty lines that let Python import from those texts. They stay modules because that keeps what users notice: `--help` answers before
torch is imported, tracebacks name common/engine.py and its lines, and Triton finds the source of its kernels.
"""

import argparse
import ast
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
SCRIPTS = ("train_sdxl", "train_opt", "train_qlora", "train_dora", "infer")

LOADER = '''
# ======================================================================================== how the texts above become modules


class _Texts(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a module from its text; Python's own machinery does the rest."""

    def _path(self, name):
        path = name.replace(".", "/")
        return f"{path}/__init__.py" if self.is_package(name) else f"{path}.py"

    def is_package(self, name):
        return any(other.startswith(f"{name}.") for other in MODULES)

    def get_source(self, name):
        return MODULES[name].removeprefix("\\n")

    def get_code(self, name):
        return self.source_to_code(self.get_source(name), os.path.join(_HERE, self._path(name)))

    def find_spec(self, name, path=None, target=None):
        if name not in MODULES:
            return None
        spec = importlib.util.spec_from_loader(name, self, origin=os.path.join(_HERE, self._path(name)))
        spec.has_location = True
        return spec


_HERE = os.path.dirname(os.path.abspath(__file__))
sys.meta_path.insert(0, _Texts())
'''


# ---------------------------------------------------------------- one-file scripts


def bundle(script):
    """The text of dist/SCRIPT.py."""
    source = (ROOT / f"{script}.py").read_text()
    doc, body = split_docstring(source)
    names = modules_of(source)
    head = (
        f"{doc}\n\n# Made by tools/bundle.py from {script}.py and {len(names)} modules; edit those, not this file.\n\n"
        "import importlib.abc\nimport importlib.util\nimport os\nimport sys\n\nMODULES = {}"
    )
    texts = [f"\n\n# {heading(path_of(name))}\n\nMODULES[{name!r}] = r'''\n{text_of(name)}'''" for name in names]
    return f"{head}{''.join(texts)}\n{LOADER}\n\n# {heading(f'{script}.py')}\n{body}"


def heading(path):
    return f"{'=' * (110 - len(str(path)))} {path}"


def split_docstring(source):
    """(a script's docstring with its quotes, the rest)."""
    end = ast.parse(source).body[0].end_lineno
    lines = source.splitlines(keepends=True)
    return "".join(lines[:end]).rstrip("\n"), "".join(lines[end:])


def modules_of(source):
    """Names of the repository's modules that `source` needs, directly or not, in alphabetical order; imports inside functions count."""
    found, open_sources = set(), [source]
    while open_sources:
        for name in imports_of(open_sources.pop()):
            for part in (name.partition(".")[0], name):  # the package too
                if part not in found and path_of(part) is not None:
                    found.add(part)
                    open_sources.append(text_of(part))
    return sorted(found)


def imports_of(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def path_of(name):
    """Where the repository keeps a module, relative to its root; None for everybody else's, and for names inside of a module."""
    if name.partition(".")[0] not in ("common", "demo"):
        return None
    path = Path(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if (ROOT / file).exists()), None)


def text_of(name):
    text = (ROOT / path_of(name)).read_text()
    if "'''" in text:
        raise SystemExit(f"{path_of(name)}: holds three single quotes in a row, which would end its text in a bundle; use double ones")
    return text


# ---------------------------------------------------------------- notebooks

RUNS = {  # script -> (what it is for, what it needs, flags of the documented run)
    "train_sdxl": ("LoRA at 1024 px, the best quality.", "a GPU with 14 GB", "--max_train_minutes 600"),
    "train_opt": (
        "LoRA at 768 px with Min-SNR, offset noise and EMA.",
        "a GPU with 8 to 12 GB",
        "--resolution 768 --max_train_minutes 600",
    ),
    "train_qlora": ("LoRA on a 4-bit base, the least memory.", "a GPU with 4 GB or more", "--strategy aggressive --max_train_minutes 600"),
    "train_dora": ("Weight-decomposed LoRA.", "a GPU with 8 to 12 GB", "--max_train_minutes 600"),
    "infer": ("The base model and every adapter side by side.", "a GPU with 8 GB or more", "--compare"),
}


def notebook(script):
    """The text of dist/SCRIPT.ipynb."""
    what, needs, flags = RUNS[script]
    training = script != "infer"
    cells = [
        markdown(
            f"# {script}.py\n\n{what} Needs {needs}, and internet for the model (about 7 GB) unless it lies under `/kaggle/input`: then give"
            " its folder with `--pretrained_model_name_or_path`.\n\nRun all cells. The style comes from `--dataset_name`"
            " (default: `lambdalabs/naruto-blip-captions`), or from your own captioned pictures with `--train_data_dir FOLDER`.\n\n"
            "With the environment variable `SUITE_DEMO=1` the notebook runs on a CPU with a tiny random model: it shows that everything works."
        ),
        code(f"# the installed torch is kept\n%pip install -q {' '.join(requirements())}"),
        *(code(f"%%writefile {name}.py\n{bundle(name)}") for name in ([script, "infer"] if training else [script])),
        code(
            "import os\nimport sys\n\n"
            'DEMO = os.environ.get("SUITE_DEMO") == "1"\n'
            'LAUNCH = sys.executable if DEMO else f"{sys.executable} -m accelerate.commands.launch"  # uses every GPU there is\n'
            f'FLAGS = "--demo" if DEMO else "{flags}"'
        ),
    ]
    if training:
        cells += [
            markdown(f"Train. A session that ends goes on with `--resume_from_checkpoint latest`. All flags: `!python {script}.py --help`"),
            code(f"!{{LAUNCH}} {script}.py {{FLAGS}} --output_dir outputs/{script}"),
            markdown("Base model and adapter, the same prompts and the same noise."),
            code(f'!{{LAUNCH}} infer.py --compare {{"--demo" if DEMO else ""}} --lora outputs/{script} --output_dir outputs/compare'),
        ]
    else:
        cells += [
            markdown("Adapters: add `--lora PATH` for each; without one, every run in `outputs/` is a column."),
            code('ADAPTERS = ""  # for instance "--lora /kaggle/input/my-run/train_opt"'),
            code(
                "if DEMO:\n    FLAGS = \"--demo --prompt 'a laughing boy' --num_images 2\"\n"
                "!{LAUNCH} infer.py {FLAGS} {ADAPTERS} --output_dir outputs/compare"
            ),
        ]
    shown = [f"outputs/{script}/training.png", f"outputs/{script}/samples/*.png"] if training else ["outputs/compare/images/*.png"]
    cells += [
        code(
            "import glob\n\nfrom IPython.display import Image, display\n\n"
            f"for pattern in {[*shown, 'outputs/compare/compare.png']!r}:\n"
            "    for name in sorted(glob.glob(pattern))[-4:]:\n        print(name)\n        display(Image(filename=name))"
        ),
        markdown("Keep the result: Kaggle keeps its working folder, Colab forgets everything but your Drive."),
        code(
            "import shutil\nfrom pathlib import Path\n\n"
            'drive = Path("/content/drive/MyDrive")  # from google.colab import drive; drive.mount("/content/drive")\n'
            "if drive.is_dir():\n"
            '    shutil.copytree("outputs", drive / "sdxl_style", dirs_exist_ok=True)\n'
            '    print(f"copied to {drive}/sdxl_style")\n'
            "print(f\"everything is in {Path('outputs').resolve()}\")"
        ),
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:02d}"
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False) + "\n"


def markdown(text):
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}


def code(text):
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": text.splitlines(keepends=True)}


def requirements():
    """The packages of requirements.txt with their ranges, quoted for the shell, torch left out."""
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return [f'"{line}"' for line in lines if line and not line.startswith("#") and line != "torch"]


# ---------------------------------------------------------------- commands


def results():
    """{file name in dist/: text}."""
    return {f"{script}{suffix}": make(script) for script in SCRIPTS for suffix, make in ((".py", bundle), (".ipynb", notebook))}


def stale():
    """Names in dist/ that are not what the sources make."""
    return [name for name, text in results().items() if not (DIST / name).exists() or (DIST / name).read_text() != text]


def execute(script):
    """Run a notebook with this Python as its kernel in an empty folder -> the PNG pictures it shows, as base64 texts."""
    import nbformat
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(SUITE_DEMO="1", XDG_CACHE_HOME=f"{folder}/cache", ACCELERATE_USE_CPU="true")
        done = NotebookClient(nbformat.read(DIST / f"{script}.ipynb", 4), timeout=900, resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when dist/ is stale")
    parser.add_argument("--execute", nargs="*", metavar="SCRIPT", help="run these notebooks (default: all) with this Python")
    options = parser.parse_args()
    if options.check:
        sys.exit(f"stale: {', '.join(stale())}; run python tools/bundle.py" if stale() else 0)
    if options.execute is None:
        DIST.mkdir(exist_ok=True)
        for name, text in results().items():
            (DIST / name).write_text(text)
        return print(f"{len(results())} files in {DIST}")
    for script in options.execute or SCRIPTS:
        pictures = execute(script)
        print(f"{script}.ipynb: ran to its end, shows {len(pictures)} pictures")
        assert pictures, f"{script}.ipynb shows no picture"


if __name__ == "__main__":
    main()

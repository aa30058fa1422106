"""The layout of common/: wings that import downward only, small folders, pages within the limits of tools/house.py."""

import ast
import itertools

from tools import house

# From the lowest to the highest; wings of one level do not know each other.
LEVELS = [
    {"errors"},
    {"files", "run_folder"},
    {"system"},
    {"cli"},
    {"model"},
    {"data", "fast", "adapter_files"},
    {"render"},
    {"train"},
]
LEVEL_OF = {wing: number for number, wings in enumerate(LEVELS) for wing in wings}


def modules_named_in(file):
    """The dotted names that a file imports, at its top or later; for `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wing_of(name):
    """errors of common.errors.UserError, cli of common.cli.flags; None for what is not in common."""
    parts = name.split(".")
    return parts[1] if parts[0] == "common" and len(parts) > 1 else None


def test_every_wing_has_its_level(root):
    found = {path.stem for path in (root / "common").iterdir() if not path.name.startswith("__")}
    assert found == set(LEVEL_OF)


def test_imports_go_down_only(root):
    """Scripts -> train -> render -> data, fast, adapter_files -> model -> cli -> system -> errors and files; none to demo."""
    upward = []
    for file in (root / "common").rglob("*.py"):
        place = file.relative_to(root / "common").parts[0].removesuffix(".py")
        for name in modules_named_in(file):
            wing = wing_of(name)
            if name.partition(".")[0] in ("demo", "tools", "benchmarks", "tests"):
                upward.append((str(file), name))
            elif wing in LEVEL_OF and place in LEVEL_OF and wing != place and LEVEL_OF[wing] >= LEVEL_OF[place]:
                upward.append((str(file), name))
    assert not upward


def test_no_module_imports_itself_in_a_circle(root):
    files = {".".join(file.relative_to(root).with_suffix("").parts): file for file in (root / "common").rglob("*.py")}
    below = {name: set(modules_named_in(file)) & set(files) - {name} for name, file in files.items()}
    while below:
        leaves = [name for name, names in below.items() if not names & set(below)]
        assert leaves, f"a circle within {sorted(below)}"
        for name in leaves:
            del below[name]


def test_every_arrow_of_the_picture_is_a_module(root):
    """The names in the picture of common/__init__.py are files, each in the wing where the picture says."""
    picture = ast.get_docstring(ast.parse((root / "common/__init__.py").read_text()))
    named = [word.strip("():,") for word in picture.split() if "/" in word]
    assert len(named) > 8 and all((root / "common" / f"{name}.py").is_file() for name in named)


def test_no_call_is_a_row_of_bare_values(root):
    crowded = {str(file): [call.lineno for call in house.crowded_calls(file)] for file in house.pages(root, "common")}
    assert not {file: lines for file, lines in crowded.items() if lines}


def test_no_folder_of_common_has_more_than_twelve_entries(root):
    folders = [folder for folder in (root / "common").rglob("*") if folder.is_dir() and folder.name != "__pycache__"]
    assert len(folders) > 5 and all(len(house.entries(folder)) <= house.ENTRIES for folder in folders)


def test_no_function_of_the_scripts_and_of_common_is_longer_than_a_page(root):
    functions = itertools.chain.from_iterable(map(house.functions_of, house.pages(root, "common")))
    assert not [function.name for function in functions if house.length(function) > house.FUNCTION]

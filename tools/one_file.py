"""A script and the modules it imports as one file.

It holds each module as it stands in the repository, comments and all, as a text of its own under its path. Thirty
lines let Python import from those texts. They stay modules because that keeps what users notice: `--help` answers
before torch is imported, tracebacks name a module's file and line, and Triton finds the source of its kernels.
"""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common",)  # whose modules go into a bundle
IMPORTS = "import importlib.abc\nimport importlib.util\nimport os\nimport sys"

LOADER = '''
# ============================================================================= how the texts above become modules


class _Texts(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a module from its text; Python's own machinery does the rest."""

    def _path(self, name):
        path = name.replace(".", "/")
        return f"{path}/__init__.py" if self.is_package(name) else f"{path}.py"

    def is_package(self, name):
        return name.replace(".", "/") + "/__init__.py" in MODULES

    def get_source(self, name):
        return MODULES[self._path(name)].removeprefix("\\n")

    def get_code(self, name):
        return self.source_to_code(self.get_source(name), os.path.join(_HERE, self._path(name)))

    def find_spec(self, name, path=None, target=None):
        if self._path(name) not in MODULES:
            return None
        spec = importlib.util.spec_from_loader(name, self, origin=os.path.join(_HERE, self._path(name)))
        spec.has_location = True
        return spec


_HERE = os.path.dirname(os.path.abspath(__file__))
sys.meta_path.insert(0, _Texts())
'''


def bundle(script: str) -> str:
    """The text of dist/SCRIPT.py."""
    doc, body = split_docstring(source_of(script))
    names = modules_of(source_of(script))
    made = f"# Made by tools/bundle.py from {script}.py and {len(names)} modules; edit those, not this file."
    return f"{doc}\n\n{made}\n\n{IMPORTS}\n\n{texts_of(names)}\n\n# {heading(f'{script}.py')}\n{body}"


def texts_of(names: list[str]) -> str:
    """The modules as texts, and what makes them modules again."""
    return f"MODULES = {{}}{''.join(map(_entry, names))}\n{LOADER}"


def _entry(name: str) -> str:
    path = path_of(name)
    return f"\n\n# {heading(path)}\n\nMODULES[{path.as_posix()!r}] = r'''\n{text_of(name)}'''"


def source_of(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


def heading(path: Path | str) -> str:
    return f"{'=' * (110 - len(str(path)))} {path}"


def split_docstring(source: str) -> tuple[str, str]:
    """(a script's docstring with its quotes, the rest)."""
    end = ast.parse(source).body[0].end_lineno
    lines = source.splitlines(keepends=True)
    return "".join(lines[:end]).rstrip("\n"), "".join(lines[end:])


def modules_of(*sources: str) -> list[str]:
    """Names of the repository's modules that `sources` need, directly or not, in alphabetical order.

    Imports inside functions count. With a module go its packages: common.data.store needs common and common.data.
    """
    found = set()
    open_sources = [(source, "") for source in sources]
    while open_sources:
        for name in imports_of(*open_sources.pop()):
            for part in prefixes(name):
                if part not in found and path_of(part) is not None:
                    found.add(part)
                    open_sources.append((text_of(part), package_of(part)))
    return sorted(found)


def prefixes(name: str) -> list[str]:
    """a, a.b and a.b.c of a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def imports_of(source: str, package: str = "") -> Iterator[str]:
    """Dotted names; what `from a import b` names may be a module or something inside of one.

    `package`: where `source` stands, from which its relative imports count.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def package_of(name: str) -> str:
    """The package from which a module's relative imports count: itself, if it is one."""
    return name if path_of(name).name == "__init__.py" else name.rpartition(".")[0]


def path_of(name: str) -> Path | None:
    """Where the repository keeps a module, relative to its root.

    None for names inside of a module, and for modules of others.
    """
    if name.partition(".")[0] not in PACKAGES:
        return None
    path = Path(*name.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if (ROOT / file).exists()), None)


def text_of(name: str) -> str:
    text = (ROOT / path_of(name)).read_text()
    if "'''" in text:
        cure = "use double ones"
        raise SystemExit(f"{path_of(name)}: three single quotes in a row would end its text in a bundle; {cure}")
    return text

"""The command line as a dataclass: `parse()` reads its flags, and --help shows them in groups.

Nothing here imports torch: `--help`, a misspelt flag and a wrong value are answered at once.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from common.cli.flag_facts import GROUPS, SHARE, default_of, local_path
from common.cli.other_tools import our_name
from common.errors import UserError
from common.system import packages
from common.system.places import CACHE_DIR

packages.require_parser()

import argparse_dataclass  # noqa: E402

DEMO_ROOT = Path(CACHE_DIR) / "demo"
TRUTH_VALUES = ("true", "false", "yes", "no", "on", "off", "1", "0", "none")
WIDTH = 100  # columns of --help at most
HELP_COLUMN = 34
METAVARS = {int: "N", float: "X", str: "TEXT", local_path: "PATH"}
Flags = TypeVar("Flags")


def parse(cls: type[Flags], argv: Sequence[str] | None = None) -> Flags:
    """Read `argv` (the command line when None) into the dataclass `cls`.

    `--demo` changes defaults; what is typed still wins.

    Raises:
        UserError: for whatever argparse refuses.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    typed = {text[2:].partition("=")[0].replace("-", "_") for text in argv if text.startswith("--")}
    parser = Parser(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    parser.refuse_values_of_switches(argv)
    if "demo" in typed & names:
        # a typed list would be added to a default one, and the demo's folder of images would win over a typed data set
        owned = typed | ({"train_data_dir"} if "dataset_name" in typed else set())
        parser.set_defaults(**{name: value for name, value in _demo_defaults(cls).items() if name not in owned})
    if "num_train_epochs" in typed and "max_train_steps" in names - typed:
        parser.set_defaults(max_train_steps=None)  # typed epochs win over steps that are only a default
    return parser.parse_args(argv)


def _demo_defaults(cls: type) -> dict[str, Any]:
    """What `--demo` changes: see common/cli/demo_settings.py, and the flags' own facts."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small lose time to a second thread, up to tenfold
    from common.cli.demo_settings import demo_settings

    fields = {field.name: field for field in dataclasses.fields(cls)}
    own = {name: field.metadata["demo"] for name, field in fields.items() if "demo" in field.metadata}
    return {name: value for name, value in {**demo_settings(DEMO_ROOT), **own}.items() if name in fields}


def print_config(flags: Any) -> None:
    """What --dry_run shows: the resolved flags as JSON."""
    print(json.dumps(dataclasses.asdict(flags), indent=2))


# ---------------------------------------------------------------- the parser


class Parser(argparse_dataclass.ArgumentParser):
    """argparse-dataclass with groups, both spellings of a name, and switches that can be cleared.

    Lists are repeatable, the help names defaults, and errors are raised as UserError.
    """

    def __init__(self, cls: type):
        self._fields = {field.name: field for field in dataclasses.fields(cls)}
        self._groups = {}
        super().__init__(
            cls,
            usage="%(prog)s [--flag VALUE ...]",
            description=cls.__doc__,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )

    def add_argument(self, *names, **kwargs):
        """Called by argparse for -h, and by argparse-dataclass for each field."""
        if names[0] == "-h":
            return super().add_argument(*names, **kwargs)
        dest = kwargs.pop("dest", names[0][2:].replace("-", "_"))
        field = self._fields[dest]
        kwargs |= _reading(field, kwargs)

        # Only what was typed reaches the dataclass, which owns the defaults.
        kwargs["default"] = argparse.SUPPRESS
        kwargs["help"] = f"{kwargs['help']} (default: {_shown(default_of(field))})".replace("%", "%%")
        spellings = dict.fromkeys((f"--{dest}", f"--{dest.replace('_', '-')}"))

        # All groups are made at the first flag, so that they stand in the order of GROUPS; empty ones are not shown.
        self._groups = self._groups or {title: self.add_argument_group(title) for title in GROUPS}
        group = self._groups.get(field.metadata.get("group"), super())
        return group.add_argument(*spellings, dest=dest, **kwargs)

    def error(self, message):
        for typed in re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else ():
            message += self._hint(typed)
        raise UserError(f"{message} (--help lists every flag)")

    def _hint(self, typed: str) -> str:
        """What may be meant by an unknown flag: another tool's name for one of ours, or a misspelt one."""
        theirs = typed.lstrip("-").replace("-", "_")
        if ours := our_name(theirs, set(self._fields)):
            return f"; {typed} is called --{ours} here"
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(typed, known, n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def refuse_values_of_switches(self, argv: Sequence[str]) -> None:
        """A switch takes no value: argparse would call the `false` of `--use_ema false` a stray word.

        Raises:
            UserError: naming the two spellings that there are.
        """
        switches = [action for action in self._actions if isinstance(action, Switch)]
        names = {option: action.dest for action in switches for option in action.option_strings}
        for typed, following in zip(argv, [*argv[1:], ""]):
            option, joined, value = typed.partition("=")
            value = value if joined else following
            if option in names and (joined or value.lower() in TRUTH_VALUES):
                name = names[option]
                raise UserError(
                    f"{option} {value}: a switch takes no value; write --{name} to set it, --no_{name} to clear it"
                )


class Switch(argparse.Action):
    """A bool: `--x` sets it, `--no_x` (or `--no-x`) clears it."""

    def __init__(self, option_strings, dest, **kwargs):
        negated = [f"--no{s}{option[2:]}" for option in option_strings for s in "_-"]
        super().__init__([*option_strings, *negated], dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string in self.option_strings[: len(self.option_strings) // 3])


def _reading(field: dataclasses.Field, kwargs: dict[str, Any]) -> dict[str, Any]:
    """argparse's words for how a flag is read; `kwargs` are argparse-dataclass's, of which "type" goes for a switch."""
    if str(kwargs.get("action")).startswith("store_") or kwargs.get("type") is bool:
        kwargs.pop("type", None)
        return {"action": Switch}
    reading = {"metavar": _metavar(field, kwargs)}
    if "nargs" in kwargs:
        reading["action"] = "extend"
    if type(None) in get_args(field.type):
        reading["type"] = _or_none(kwargs["type"])
        if "choices" in kwargs:
            reading["choices"] = [*kwargs["choices"], None]
    return reading


def _metavar(field: dataclasses.Field, kwargs: dict[str, Any]) -> str:
    """What stands for a value in --help: the choices, or one word."""
    if "choices" in kwargs:
        none = ["none"] if type(None) in get_args(field.type) else []
        return "{" + ",".join([*kwargs["choices"], *none]) + "}"
    usual = "SHARE" if field.metadata.get("range") is SHARE else METAVARS[kwargs["type"]]
    return field.metadata.get("metavar", usual)


def _or_none(convert):
    """A type for argparse that also takes the word "none"."""

    def converter(text):
        return None if text.lower() == "none" else convert(text)

    converter.__name__ = convert.__name__
    return converter


def _shown(default: Any) -> Any:
    """A default as --help names it."""
    if default is None or default == []:
        return "none"
    return " ".join(default) if isinstance(default, list) else default


class _Formatter(argparse.HelpFormatter):
    """One spelling of each flag, and WIDTH columns at most."""

    def __init__(self, prog):
        width = min(WIDTH, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=HELP_COLUMN, width=width)

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)  # paths stay whole

    def _format_action_invocation(self, action):
        if action.dest == "help":
            return super()._format_action_invocation(action)
        name = f"--{action.dest}"
        if isinstance(action, Switch):
            return f"{name} / --no_{action.dest}"
        return f"{name} {action.metavar}" + (" ..." if action.nargs == "+" else "")

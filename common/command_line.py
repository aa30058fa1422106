"""The command line as a dataclass: `flag()` declares one option, `parse()` reads them, `run()` calls a script's main.

Nothing here imports torch: `--help`, a misspelt flag and a wrong value are answered at once.
"""

import argparse
import dataclasses
import difflib
import errno
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import get_args

from common import launch, packages, stopping
from common.places import CACHE_DIR

packages.require_parser()

import argparse_dataclass  # noqa: E402

DEMO_ROOT = Path(CACHE_DIR) / "demo"


class UserError(Exception):
    """A fault the user can mend: one line that names the flag or the file, what is wrong and what to do."""


def flag(default, help, **metadata):
    """One command-line flag. A list default makes it repeatable: `--x a --x b` and `--x a b` are the same.

    Metadata `demo` is the default that `--demo` gives it, in a class that has such a flag.
    """
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, "nargs": "+", **metadata})
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def local_path(text):
    """The type of a flag that names a file or folder (or, for some, a hub id): `~` is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return os.path.expanduser(text)


class Switch(argparse.Action):
    """A bool: `--x` sets it, `--no_x` (or `--no-x`) clears it."""

    def __init__(self, option_strings, dest, **kwargs):
        negated = [f"--no{s}{option[2:]}" for option in option_strings for s in "_-"]
        super().__init__([*option_strings, *negated], dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string in self.option_strings[: len(self.option_strings) // 3])


class Parser(argparse_dataclass.ArgumentParser):
    """argparse-dataclass with both spellings of a name, switches that can be cleared, repeatable lists, defaults in
    the help, and errors raised as UserError."""

    def __init__(self, cls):
        self._shown_defaults = {f.name: _shown(f) for f in dataclasses.fields(cls)}
        self._optional = {f.name for f in dataclasses.fields(cls) if type(None) in get_args(f.type)}
        super().__init__(cls, description=cls.__doc__, allow_abbrev=False)

    def add_argument(self, *names, **kwargs):
        if names[0] == "-h":
            return super().add_argument(*names, **kwargs)
        dest = kwargs.pop("dest", names[0][2:].replace("-", "_"))
        if str(kwargs.get("action")).startswith("store_") or kwargs.get("type") is bool:
            kwargs["action"] = Switch
            kwargs.pop("type", None)
        elif "nargs" in kwargs:
            kwargs["action"] = "extend"
        if dest in self._optional and "type" in kwargs:
            kwargs["type"] = _or_none(kwargs["type"])
        kwargs["default"] = argparse.SUPPRESS  # only what was typed reaches the dataclass, which owns the defaults
        kwargs["help"] = f"{kwargs['help']} (default: {self._shown_defaults[dest]})".replace("%", "%%")
        spellings = dict.fromkeys((f"--{dest}", f"--{dest.replace('_', '-')}"))
        return super().add_argument(*spellings, dest=dest, **kwargs)

    def error(self, message):
        known = [option for action in self._actions for option in action.option_strings]
        for typed in re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else ():
            close = difflib.get_close_matches(typed, known, n=1)
            message += f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{message} (--help lists every flag)")


def _or_none(convert):
    """A type for argparse that also takes the word "none"."""

    def converter(text):
        return None if text.lower() == "none" else convert(text)

    converter.__name__ = convert.__name__
    return converter


def _shown(field):
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return " ".join(default) if isinstance(default, list) and default else default or ("none" if default in (None, []) else default)


def parse(cls, argv=None):
    """Read `argv` (the command line when None) into the dataclass `cls`. `--demo` changes defaults; what is typed still wins.

    Raises:
        UserError: for whatever argparse refuses.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    typed = {text[2:].partition("=")[0].replace("-", "_") for text in argv if text.startswith("--")}
    parser = Parser(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    if "demo" in typed & names:
        # a typed list would be added to a default one
        parser.set_defaults(**{name: value for name, value in _demo_defaults(cls).items() if name not in typed})
    if "num_train_epochs" in typed and "max_train_steps" in names - typed:
        parser.set_defaults(max_train_steps=None)  # typed epochs win over steps that are only a default
    return parser.parse_args(argv)


def _demo_defaults(cls):
    """What `--demo` changes: see demo/settings.py, and the flags' own metadata."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small lose time to a second thread, up to tenfold
    from demo.settings import demo_settings

    fields = {field.name: field for field in dataclasses.fields(cls)}
    own = {name: field.metadata["demo"] for name, field in fields.items() if "demo" in field.metadata}
    return {name: value for name, value in {**demo_settings(DEMO_ROOT), **own}.items() if name in fields}


def print_config(flags):
    """What --dry_run shows: the resolved flags as JSON."""
    print(json.dumps(dataclasses.asdict(flags), indent=2))


GONE_TO_THE_END = (None, "finished", "early stopping")  # what a training's "ended" says when there is nothing to go on with
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main):
    """Call a script's main; a UserError becomes one line on stderr and exit status 2, as do a full disk and a full GPU.

    A signal outside of the training loop is one line and exit status 128 + its number: 130 after Ctrl-C. A training that a signal or
    the time limit has ended names as its last line the command that goes on.
    """
    stopping.end_in_order()
    try:
        result = main()
    except KeyboardInterrupt as signalled:
        number = signalled.args[0] if signalled.args else signal.SIGINT
        said, status = stopping.ended_by(number), 128 + number
    except UserError as error:
        said, status = f"error: {error}", 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        said, status = f"error: {error}: make room there, or name another place", 2
    except RuntimeError as error:
        from common import memory

        if not memory.ran_out(error):
            raise
        said, status = f"error: {memory.OutOfMemory('while loading')}", 2
    else:
        if isinstance(result, dict) and result.get("ended") not in GONE_TO_THE_END and launch.rank() == 0:
            print(f"to go on: {launch.resuming_command(sys.argv)}", flush=True)
        return result
    if launch.rank() == 0 or status == 2:
        launch.say_last(said)
    sys.exit(status)


class Described:
    """Base of flag dataclasses: a subclass that overrides a field gives the new default only, and keeps the help."""

    def __init_subclass__(cls):
        inherited = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        for name in cls.__dict__.get("__annotations__", {}):
            default = cls.__dict__.get(name)
            if name in inherited and not isinstance(default, dataclasses.Field):
                metadata = dict(inherited[name].metadata)
                setattr(cls, name, flag(default, metadata.pop("help"), **metadata))

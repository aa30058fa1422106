"""The command line as a dataclass: `flag()` declares one option, `parse()` reads them, `run()` calls a script's main.

Nothing here imports torch: `--help`, a misspelt flag and a wrong value are answered at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import get_args

from common import launch, packages, stopping
from common.places import CACHE_DIR

packages.require_parser()

import argparse_dataclass  # noqa: E402

from common.other_tools import our_name  # noqa: E402

DEMO_ROOT = Path(CACHE_DIR) / "demo"


LONGEST_WORD, LONGEST_LINE = 300, 1500


class UserError(Exception):
    """A fault the user can mend: one line that names the flag or the file, what is wrong and what to do; long values are shortened."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` without line breaks, and without the middle of what nobody reads to its end."""
    words = [_without_middle(word, LONGEST_WORD) for word in text.split()]
    return _without_middle(" ".join(words), LONGEST_LINE)


def _without_middle(text: str, longest: int) -> str:
    """`text` of at most `longest` characters: its beginning and its end."""
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[3 - longest // 2 :]}"


def flag(default, help, **metadata):
    """One command-line flag. A list default makes it repeatable: `--x a --x b` and `--x a b` are the same.

    Metadata `demo` is the default that `--demo` gives it, in a class that has such a flag.
    """
    if isinstance(default, list):
        return dataclasses.field(
            default_factory=lambda: list(default), metadata={"help": help, "nargs": "+", **metadata}
        )
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def local_path(text):
    """The type of a flag that names a file or folder (or, for some, a hub id): `~` is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return os.path.expanduser(text)


TRUTH_VALUES = ("true", "false", "yes", "no", "on", "off", "1", "0", "none")


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
            if "choices" in kwargs:
                kwargs["metavar"] = f"{{{','.join(kwargs['choices'])},none}}"
                kwargs["choices"] = [*kwargs["choices"], None]
        kwargs["default"] = argparse.SUPPRESS  # only what was typed reaches the dataclass, which owns the defaults
        kwargs["help"] = f"{kwargs['help']} (default: {self._shown_defaults[dest]})".replace("%", "%%")
        spellings = dict.fromkeys((f"--{dest}", f"--{dest.replace('_', '-')}"))
        return super().add_argument(*spellings, dest=dest, **kwargs)

    def error(self, message):
        for typed in re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else ():
            message += self._hint(typed)
        raise UserError(f"{message} (--help lists every flag)")

    def _hint(self, typed):
        """What may be meant by an unknown flag: another tool's name for one of ours, or a misspelt one."""
        theirs = typed.lstrip("-").replace("-", "_")
        if ours := our_name(theirs, set(self._shown_defaults)):
            return f"; {typed} is called --{ours} here"
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(typed, known, n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def refuse_values_of_switches(self, argv):
        """A switch takes no value: `--use_ema false` would leave a stray word, and `--use_ema=false` an explanation that explains nothing.

        Raises:
            UserError: naming the two spellings that there are.
        """
        switches = {
            option: action.dest
            for action in self._actions
            if isinstance(action, Switch)
            for option in action.option_strings
        }
        for typed, following in zip(argv, [*argv[1:], ""]):
            option, joined, value = typed.partition("=")
            value = value if joined else following
            if option in switches and (joined or value.lower() in TRUTH_VALUES):
                name = switches[option]
                raise UserError(
                    f"{option} {value}: a switch takes no value; write --{name} to set it, --no_{name} to clear it"
                )


def _or_none(convert):
    """A type for argparse that also takes the word "none"."""

    def converter(text):
        return None if text.lower() == "none" else convert(text)

    converter.__name__ = convert.__name__
    return converter


def _shown(field):
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return (
        " ".join(default)
        if isinstance(default, list) and default
        else default or ("none" if default in (None, []) else default)
    )


def parse(cls, argv=None):
    """Read `argv` (the command line when None) into the dataclass `cls`. `--demo` changes defaults; what is typed still wins.

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


def _demo_defaults(cls):
    """What `--demo` changes: see common/demo_settings.py, and the flags' own metadata."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small lose time to a second thread, up to tenfold
    from common.demo_settings import demo_settings

    fields = {field.name: field for field in dataclasses.fields(cls)}
    own = {name: field.metadata["demo"] for name, field in fields.items() if "demo" in field.metadata}
    return {name: value for name, value in {**demo_settings(DEMO_ROOT), **own}.items() if name in fields}


def print_config(flags):
    """What --dry_run shows: the resolved flags as JSON."""
    print(json.dumps(dataclasses.asdict(flags), indent=2))


GONE_TO_THE_END = (
    None,
    "finished",
    "early stopping",
)  # what a training's "ended" says when there is nothing to go on with
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main):
    """Call a script's main; a UserError becomes one line on stderr and exit status 2, as do a full disk and a full GPU.

    A signal outside of the training loop is one line and exit status 128 + its number: 130 after Ctrl-C. Any other error is one line and
    1, with its traceback in a file. A training that a signal or the time limit has ended names as its last line the command that goes on.
    A reader of stdout who leaves (`| head`) does not end the run.
    """
    stopping.end_in_order()
    with _outliving_its_reader():
        try:
            result = main()
        except (KeyboardInterrupt, Exception) as error:
            said, status = _told(error)
        else:
            if isinstance(result, dict) and result.get("ended") not in GONE_TO_THE_END and launch.rank() == 0:
                print(f"to go on: {launch.resuming_command(sys.argv)}", flush=True)
            launch.leave_group()
            return result
    if launch.rank() == 0 or status in (1, 2):
        launch.say_last(said)
    sys.exit(status)


def _told(error: BaseException) -> tuple[str, int]:
    """(what is said, the exit status) of an error that ends a script."""
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        return stopping.ended_by(number), 128 + number
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"error: {one_line(str(error))}: make room there, or name another place", 2
    if isinstance(error, RuntimeError):
        from common import memory

        if memory.ran_out(error):
            return f"error: {memory.OutOfMemory('while loading')}", 2
    return _unforeseen(error), 1


def _unforeseen(error: Exception) -> str:
    """The line for an error that no check has foreseen; its traceback is written to the output folder, or where that is not there to a
    temporary one."""
    locals_of = [
        frame.f_locals.get("flags") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]  # the first are main's
    output_dir = next((vars(flags).get("output_dir") for flags in locals_of if dataclasses.is_dataclass(flags)), None)
    place = output_dir if output_dir and os.path.isdir(output_dir) else None
    try:
        descriptor, file = tempfile.mkstemp(prefix="error_", suffix=".txt", dir=place)
    except OSError:  # the folder itself may be at fault
        descriptor, file = tempfile.mkstemp(prefix="error_", suffix=".txt")
    with open(descriptor, "w") as report:
        report.write(f"{shlex.join(sys.argv)}\nPython {sys.version}\n\n{''.join(traceback.format_exception(error))}")
    what = f"{type(error).__name__}: {one_line(str(error))}"
    return f"error: unforeseen {what}; the traceback is in {file}, please report it with that file"


class _Outlet:
    """Standard output or error whose reader may leave: what is still written then goes nowhere."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        with self._to_nowhere_if_closed():
            return self._stream.write(text)

    def flush(self):
        with self._to_nowhere_if_closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _to_nowhere_if_closed(self):
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextlib.contextmanager
def _outliving_its_reader():
    with contextlib.redirect_stdout(_Outlet(sys.stdout)), contextlib.redirect_stderr(_Outlet(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


class Described:
    """Base of flag dataclasses: a subclass that overrides a field gives the new default only, and keeps the help."""

    def __init_subclass__(cls):
        inherited = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        for name in cls.__dict__.get("__annotations__", {}):
            default = cls.__dict__.get(name)
            if name in inherited and not isinstance(default, dataclasses.Field):
                metadata = dict(inherited[name].metadata)
                setattr(cls, name, flag(default, metadata.pop("help"), **metadata))

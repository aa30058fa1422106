"""What is true of one flag stands at its `flag(...)`: help, group, range, whether a resumed run may change it.

Whoever needs the flags of which something is true asks for them here; there is no second list of their names.
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, Literal

GROUPS = (  # the titles of --help, in its order
    "trying it out",
    "pictures",
    "model",
    "data",
    "captions",
    "adapter",
    "optimisation",
    "loss",
    "memory and speed",
    "validation",
    "output",
)

# ---------------------------------------------------------------- ranges

Range = Callable[[float], str | None]  # of a value: None where the flag may have it, else what it must be


def allowing(holds: Callable[[float], bool], must: str) -> Range:
    """The numbers for which `holds`; of others it is said that they `must`."""
    return lambda value: None if holds(value) else must


def multiple_of(step: int, least: int = 64) -> Range:
    """Whole multiples of `step` from `least`; of another number the nearest one is named."""

    def complaint(value: float) -> str | None:
        if value >= least and value % step == 0:
            return None
        nearest = max(least, round(value / step) * step)
        return f"must be a multiple of {step}, at least {least}; the nearest is {nearest}"

    return complaint


ANY = allowing(math.isfinite, "must be a number")
POSITIVE = allowing(lambda value: 0 < value < math.inf, "must be greater than 0, and finite")
FROM_ZERO = allowing(lambda value: 0 <= value < math.inf, "must be 0 or greater, and finite")
FROM_ONE = allowing(lambda value: value >= 1, "must be at least 1")
SHARE = allowing(lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
SEED = allowing(lambda value: 0 <= value < 2**32, "must be at least 0 and less than 2^32")

# ---------------------------------------------------------------- the declaration


def flag(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    range: Range | None = None,
    resume: Literal["free"] | None = None,
    changes_a_pass: bool = False,
    type: Callable[[str], Any] | None = None,
    choices: list[str] | None = None,
    metavar: str | None = None,
    demo: Any = None,
) -> Any:
    """One command-line flag. A list default makes it repeatable: `--x a --x b` and `--x a b` are the same.

    Args:
        group: one of GROUPS, under which --help shows it.
        range: the numbers it may have.
        resume: "free" where a resumed run may change it without a word, since it does not change what is computed.
        changes_a_pass: the memory or the time of a training pass depends on it, so a remembered plan does.
        type: what makes a value of a text, where that is not the field's type.
        metavar: what stands for its value in --help, where that is not N, X, SHARE, TEXT or PATH.
        demo: the default that --demo gives it.
    Raises:
        ValueError: a group or a word for `resume` that there is not.
    """
    if group not in (None, *GROUPS):
        raise ValueError(f"group={group!r}: not one of {GROUPS}")
    if resume not in (None, "free"):
        raise ValueError(f'resume={resume!r}: "free" or nothing')
    facts = dict(help=help, group=group, range=range, resume=resume, changes_a_pass=changes_a_pass)
    facts |= dict(type=type, choices=choices, metavar=metavar, demo=demo)
    return _field(default, {name: fact for name, fact in facts.items() if not (fact is None or fact is False)})


def _field(default: Any, facts: dict[str, Any]) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={**facts, "nargs": "+"})
    return dataclasses.field(default=default, metadata=facts)


class Described:
    """Base of flag dataclasses: a subclass that overrides a flag gives what differs, and keeps the other facts."""

    def __init_subclass__(cls) -> None:
        inherited = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        for name in inherited.keys() & cls.__dict__.get("__annotations__", {}).keys():
            own = cls.__dict__[name]
            facts = dict(inherited[name].metadata)
            if isinstance(own, dataclasses.Field):
                facts |= own.metadata
                own = default_of(own)
            setattr(cls, name, _field(own, facts))


def local_path(text: str) -> str:
    """The type of a flag that names a file or folder (or, for some, a hub id): `~` is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return os.path.expanduser(text)


# ---------------------------------------------------------------- questions


def default_of(field: dataclasses.Field) -> Any:
    """The default of a flag; of a list a new one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def names_where(flags: Any, **facts: Any) -> list[str]:
    """The names of the flags, of a dataclass or one of its instances, that have all of `facts`, in their order."""
    return [
        field.name
        for field in dataclasses.fields(flags)
        if all(field.metadata.get(name) == fact for name, fact in facts.items())
    ]


def outside_range(flags: Any) -> str | None:
    """What is wrong with the first flag whose value is outside its range: flag, value and what it must be."""
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if "range" in field.metadata and value is not None and (must := field.metadata["range"](value)):
            return f"--{field.name} {value}: {must}"
    return None

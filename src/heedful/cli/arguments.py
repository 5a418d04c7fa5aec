"""Arguments are checked against the flags before they are parsed: one line says what is wrong with the first."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from heedful.cli.errors import UsageError
from heedful.ops.checks import did_you_mean, nearest


@dataclasses.dataclass(frozen=True)
class Flag:
    """What a flag or a positional argument takes."""

    name: str
    """As it is typed: `--d-model`, or `RUN`."""
    type: Any
    help: str
    required: bool
    positional: bool

    @property
    def switch(self) -> bool:
        """Whether it may be given without a value."""
        return self.type is bool or self.undecided

    @property
    def undecided(self) -> bool:
        """Whether it is a switch that nobody has set, on or off."""
        return self.type == bool | None

    @property
    def spec(self) -> PrimitiveConstructorSpec[Any] | None:
        """How tyro reads its value; None where it is not a single word."""
        spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(self.type, set()))
        return spec if isinstance(spec, PrimitiveConstructorSpec) and spec.nargs == 1 else None


def flags_of(fields: Sequence[tuple[str, Any, Any]], prefix: str = "") -> list[Flag]:
    """The flags of `parse`'s fields; those of a section are called `--section.name`."""
    flags = []
    for name, annotated, field in fields:
        type_, *notes = get_args(annotated)
        shown = next(note for note in notes if hasattr(note, "help"))
        if dataclasses.is_dataclass(type_):
            own = [(f.name, f.type, f) for f in dataclasses.fields(type_)]
            flags += flags_of(own, f"{shown.name}.")
            continue
        positional = tyro.conf.Positional in notes
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        typed = name.upper() if positional else "--" + (prefix + name).replace("_", "-")
        flags.append(Flag(typed, type_, shown.help or "", required, positional))
    return flags


def check(
    flags: Sequence[Flag], arguments: Sequence[str], owners: Callable[[str], str] = lambda name: ""
) -> None:
    """Raise UsageError for the first argument that cannot be.

    Args:
        flags: what there is.
        arguments: what was typed.
        owners: says of a flag that there is not what it would belong to, or nothing.
    """
    named = {flag.name: flag for flag in flags if not flag.positional}
    switched_off = {"--no-" + name.removeprefix("--") for name, flag in named.items() if flag.switch}
    words: list[str] = []
    waiting = list(reversed(arguments))
    while waiting:
        word = waiting.pop()
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in switched_off:
            continue
        if name not in named:
            belongs = owners(name)
            raise UsageError(f"unknown option {name}{f' here: {belongs}' if belongs else _hint(name, named)}")
        flag = named[name]
        if flag.switch and not equals:
            continue
        if not equals:
            if not waiting or waiting[-1].startswith("--"):
                raise UsageError(f"{name} needs a value: {flag.help}")
            value = waiting.pop()
        _check_value(flag, value)
        while flag.spec is None and waiting and not waiting[-1].startswith("--"):
            waiting.pop()  # one of several values; tyro reads them
    _check_words(words, [flag for flag in flags if flag.positional])


def spelled_out(flags: Sequence[Flag], arguments: Sequence[str]) -> list[str]:
    """`--name` and `--no-name` of switches that may be left undecided as `--name=True` and `--name=False`.

    tyro knows switches that are on or off, and wants a value for all else.
    """
    values: dict[str, str] = {}
    for flag in flags:
        if flag.undecided:
            values |= {flag.name: f"{flag.name}=True", "--no-" + flag.name[2:]: f"{flag.name}=False"}
    return [values.get(word.replace("_", "-"), word) for word in arguments]


def _check_words(words: Sequence[str], positional: Sequence[Flag]) -> None:
    for flag in positional[len(words) :]:
        if flag.required:
            raise UsageError(f"{flag.name} is missing: {flag.help}")
    if len(words) > len(positional):
        raise UsageError(f"unexpected argument {words[len(positional)]!r}")
    for flag, word in zip(positional, words, strict=False):
        _check_value(flag, word)


def _check_value(flag: Flag, value: str) -> None:
    spec = flag.spec
    if spec is None:
        return
    if spec.choices and value not in spec.choices:
        hint = did_you_mean(value, spec.choices)
        raise UsageError(
            f"{flag.name} must be {' or '.join(spec.choices)}, got {value!r}; {hint}".rstrip("; ")
        )
    kind = spec.metavar.rpartition("|")[2]
    what = {"INT": "a whole number", "FLOAT": "a number"}.get(kind)
    try:
        spec.instance_from_str([value])
        if what is not None and not value.isascii():  # Python reads the digits of every script
            raise ValueError
    except ValueError:
        what = what or spec.metavar
        raise UsageError(f"{flag.name} takes {what}, got {value!r}") from None


def _hint(name: str, named: Mapping[str, Flag]) -> str:
    """The flag that an unknown one could have been: an option of a form for one of those, else a plain one."""
    near = nearest(name, [known for known in named if ("." in known) == ("." in name)], cutoff=0.75)
    return f"; did you mean {near}?" if near else ""

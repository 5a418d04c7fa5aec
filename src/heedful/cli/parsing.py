"""From settings dataclasses to flags; the chosen forms' own options become `--attention.*`, `--score.*`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

import tyro

from heedful.attention.config import own_fields
from heedful.attention.registry import ATTENTIONS, SCORES, Registry
from heedful.cli.arguments import check, flags_of, spelled_out
from heedful.cli.errors import UsageError
from heedful.cli.wrapping import wrapped
from heedful.data.tasks import TASKS, task_class

T = TypeVar("T")

# Shown as sections of their own, built from the chosen forms.
_OPTION_FIELDS = {"attention_options", "score_options", "task_options"}


def flag_fields(settings_class: Any, **defaults: Any) -> list[tuple[str, Any, Any]]:
    """(name, annotated type, dataclass field) of every setting, for `parse`."""
    fields = []
    for f in dataclasses.fields(settings_class):
        if f.name not in _OPTION_FIELDS:
            fields.append(flag(f.name, f.type, defaults.get(f.name, f.default), f.metadata["help"]))
    return fields


def flag(name: str, type_: Any, default: Any, help: str) -> tuple[str, Any, Any]:
    """One flag; `default=dataclasses.MISSING` makes it required."""
    metavar = f"| --no-{name.replace('_', '-')}" if type_ == bool | None else _metavar(type_)
    annotated = Annotated[type_, tyro.conf.arg(help=help, metavar=metavar)]
    return name, annotated, dataclasses.field(default=default)


def _metavar(type_: Any) -> str | None:
    """`INT` for what may be left out, where tyro would say `{None}|INT`; None leaves it to tyro."""
    kinds = [kind for kind in get_args(type_) if kind is not type(None)]
    optional = len(kinds) < len(get_args(type_)) and len(kinds) == 1 and isinstance(kinds[0], type)
    return kinds[0].__name__.upper() if optional else None


def positional(name: str, type_: Any, default: Any, help: str) -> tuple[str, Any, Any]:
    """One positional argument."""
    shown = tyro.conf.arg(help=help, metavar=name.upper())
    annotated = Annotated[type_, tyro.conf.Positional, shown]
    return name, annotated, dataclasses.field(default=default)


def form_options(
    kind: str, registry: Registry, names: Sequence[str], defaults: Mapping[str, Any] | None = None
) -> tuple[str, Any, Any] | None:
    """The own options of the named forms, as `--{kind}.*`; None when they have none."""
    defaults = defaults or {}
    fields: dict[str, tuple[str, Any, Any]] = {}
    for name in names:
        try:
            config_class = registry[name].config_class
        except ValueError as error:
            raise UsageError(f"--{kind}: {error}") from None
        for f in own_fields(config_class):
            help = f.metadata.get("help", "")
            default = defaults.get(f.name, f.default if f.default is not dataclasses.MISSING else None)
            fields.setdefault(f.name, flag(f.name, f.type, default, help))
    return options_section(kind, names, list(fields.values())) if fields else None


def task_options(data: str, given: Mapping[str, Any] | None = None) -> tuple[str, Any, Any] | None:
    """The options of the synthetic task that the data is, as `--task.*`; None for other data."""
    try:
        task = task_class(data)
    except ValueError as error:
        raise UsageError(f"--data: {error}") from None
    if task is None:
        return None
    own = dataclasses.fields(task)
    fields = [flag(f.name, f.type, (given or {}).get(f.name, f.default), f.metadata["help"]) for f in own]
    return options_section("task", [data], fields)


def options_section(
    kind: str, names: Sequence[str], fields: list[tuple[str, Any, Any]]
) -> tuple[str, Any, Any]:
    """Flags of the named forms as `--{kind}.*`, under a heading of their own."""
    section: Any = dataclasses.make_dataclass(f"options of {', '.join(names)}", fields)
    annotated = Annotated[section, tyro.conf.arg(name=kind, help="")]
    return f"{kind}_options", annotated, dataclasses.field(default_factory=section)


def peek(arguments: Sequence[str], name: str, default: str) -> str:
    """The value of `--name` before anything is parsed: which options exist depends on it."""
    value = default
    for i, argument in enumerate(arguments):
        if argument == f"--{name}" and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value


def whole(text: str) -> int:
    """The number; only digits that a keyboard has, where `int` reads those of every script."""
    if not text.isascii():
        raise ValueError(f"expected a whole number, got {text!r}")
    return int(text)


def split(flag_name: str, value: str, convert: Callable[[str], T]) -> tuple[T, ...]:
    """`a,b` -> `(convert("a"), convert("b"))`."""
    made = []
    for part in filter(None, map(str.strip, value.split(","))):
        try:
            made.append(convert(part))
        except ValueError:
            what = "numbers" if convert is float else "whole numbers"
            got = repr(part) if part == value else f"{part!r} in {value!r}"
            raise UsageError(f"{flag_name} takes {what} separated by commas, got {got}") from None
    return tuple(made)


def parse(
    command: str, description: str, fields: Sequence[tuple[str, Any, Any] | None], arguments: Sequence[str]
) -> dict[str, Any]:
    """Parse flags into a plain dict; option sections become dicts of what was changed from the default.

    Raises:
        UsageError: for flags that cannot be parsed.
        SystemExit: with code 0, after `--help`.
    """
    wanted = [f for f in fields if f is not None]
    # fields without a default come first, as in any dataclass
    wanted.sort(key=lambda f: f[2].default is not dataclasses.MISSING or _has_factory(f[2]))
    settings = dataclasses.make_dataclass(command, wanted)
    asked = any(word in ("-h", "--help") for word in arguments)
    try:
        if asked:
            print(wrapped(description) + "\n")  # tyro would put each paragraph on one line
        else:
            check(flags_of(wanted), arguments, _owners)
            arguments = spelled_out(flags_of(wanted), arguments)
        parsed: Any = tyro.cli(
            settings,
            prog=f"heedful {command}",
            description="",
            args=["--help"] if asked else list(arguments),
            console_outputs=asked,
        )
    except UsageError as error:
        raise UsageError(f"{error}; see heedful {command} --help") from None
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise UsageError(f"the options cannot be read; see heedful {command} --help") from None
    values: dict[str, Any] = {}
    for f in dataclasses.fields(parsed):
        value = getattr(parsed, f.name)
        values[f.name] = _changed(value) if f.name in _OPTION_FIELDS else value
    return values


def _owners(flag_name: str) -> str:
    """What an option belongs to that nobody named here: a form, or a synthetic task."""
    kind, _, option = flag_name.removeprefix("--").partition(".")
    option = option.replace("-", "_")
    if kind == "task":
        tasks = [name for name, task in TASKS.items() if option in {f.name for f in dataclasses.fields(task)}]
        return f"it is an option of --data synthetic:{' or '.join(tasks)}" if tasks else ""
    registry = {"attention": ATTENTIONS, "score": SCORES}.get(kind)
    if registry is None:
        return ""
    forms = [n for n in registry if option in {f.name for f in own_fields(registry[n].config_class)}]
    return f"it is an option of {kind} {' and '.join(forms)}, which is not chosen" if forms else ""


def _has_factory(f: Any) -> bool:
    return f.default_factory is not dataclasses.MISSING


def _changed(section: Any) -> dict[str, Any]:
    return {
        f.name: getattr(section, f.name)
        for f in dataclasses.fields(section)
        if getattr(section, f.name) != f.default
    }


def kv_budget_of(text: str | None) -> int | list[int] | str | None:
    """`64`, `64,32`, `full`, or None: what the model's config says."""
    if text is None or text == "full":
        return text
    try:
        budgets = [whole(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--kv-budget takes a number, one per layer, or full; got {text!r}") from None
    return budgets[0] if len(budgets) == 1 else budgets

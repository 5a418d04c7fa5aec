"""What the values in the file of a study must be, said before anything is built of them."""

import math
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints

from heedful.training.settings import TrainSettings

REQUIRED = ("title", "claim", "source", "metric", "effect", "spread", "seeds", "rates", "arms", "contrasts")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _many(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _tables(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_table, value.values()))


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("title", "claim", "source", "metric", "limits", "x"), ("text", _text)),
    **dict.fromkeys(("effect", "spread"), ("a finite number", _number)),
    "seeds": ("a whole number", _whole),
    "rates": ("a list of finite numbers", _many(_number)),
    "lengths": ("a list of whole numbers", _many(_whole)),
    "forms": ("a list of files", _many(_text)),
    **dict.fromkeys(("train", "budgets"), ("a table", _table)),
    **dict.fromkeys(("arms", "scale"), ("a table of tables", _tables)),
    "contrasts": ("a list of tables", _many(_table)),
}
BUDGETS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kept": ("a list of whole numbers of 1 or more", _many(lambda n: _whole(n) and n >= 1)),
    "policies": (
        "a table of lists of names",
        lambda value: _table(value) and all(map(_many(_text), value.values())),
    ),
    "arms": ("a list of arms", _many(_text)),
}
CONTRAST: dict[str, tuple[str, Callable[[Any], bool]]] = dict.fromkeys(
    ("arm", "against", "claims", "says"), ("text", _text)
)
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def check_values(
    raw: Mapping[str, Any], kinds: Mapping[str, tuple[str, Callable[[Any], bool]]] = KINDS
) -> None:
    """Raise ValueError for the first value of another kind than its name says."""
    for name, value in raw.items():
        what, fits = kinds.get(name, ("", lambda value: True))
        if not fits(value):
            raise ValueError(f"{name} must be {what}, got {value!r}")


def check_complete(raw: Mapping[str, Any]) -> None:
    """Raise ValueError for the first thing that a study must have and this one has not."""
    for name in REQUIRED:
        if name not in raw:
            raise ValueError(f"{name} is missing")


def check_settings(what: str, values: Mapping[str, Any]) -> None:
    """Raise for the first setting whose value is of another kind than the setting."""
    kinds = get_type_hints(TrainSettings) | {"match": str, "to": str}
    for name, value in values.items():
        allowed = {
            kind for kind in (get_args(kinds.get(name)) or (kinds.get(name),)) if isinstance(kind, type)
        }
        simple = allowed and allowed <= {int, float, str, bool, NoneType}
        if simple and type(value) not in (allowed | ({int} if float in allowed else set())):
            wanted = " or ".join(WORDS[kind] for kind in WORDS if kind in allowed)
            raise ValueError(f"{what}: {name} must be {wanted}, got {value!r}")

"""What an attack is: seeded cases, each of which holds, is refused in plain words, or breaks a promise."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

Case = Callable[[random.Random, Path], str]
"""Tries one case in an empty folder and returns what kind it was; raises where a promise is broken."""


@dataclass(frozen=True)
class Attack:
    """A generator of cases and its part of the time."""

    name: str
    covers: str
    """One line for the table."""
    share: float
    """Of the minutes there are."""
    start: Callable[[Path], Case]
    """Makes in a folder what the cases need, and returns how to try one."""
    limit: float = 60.0
    """Seconds after which a case counts as broken."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case; `kind` is "" where it could not be told."""

    attack: str
    case: int
    kind: str
    failure: str | None
    seconds: float

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class Broken(AssertionError):
    """A promise that does not hold; the message says which, and with what."""


def source_of(seed: int, attack: str, case: int) -> random.Random:
    """The random numbers of one case, the same whichever cases were tried before."""
    return random.Random(f"{seed} {attack} {case}")

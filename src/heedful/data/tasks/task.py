"""What every synthetic task is: sequences to draw, and versions of it that are longer or shorter."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from heedful.data.packing import IGNORE

BOS = 0
"""The id of the token that every sequence begins with."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sequences in which some tokens can be known from those before; only these are labelled.

    A task is a frozen dataclass whose fields are its options; sizes are whole numbers of at least `least`.
    """

    name: ClassVar[str]
    """After `synthetic:`."""
    grows: ClassVar[str]
    """The option that a longer sequence has more of."""
    least: ClassVar[dict[str, int]] = {}
    """The smallest values of options whose smallest is not 1."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), self.least.get(field.name, 1)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{field.name} of {self.name} must be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"{field.name} of {self.name} must be at least {least}, got {value}")
        self.check()

    def check(self) -> None:
        """Raise where options do not go together."""

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        raise NotImplementedError

    def _draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`draw`, from this generator."""
        raise NotImplementedError

    def draw(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Draw `n` sequences; the same arguments give the same sequences.

        Args:
            n: number of sequences.
            seed: of the sequences; the global generator is not touched.

        Returns:
            `input_ids` and `labels`, int64 (n, length). A label is what a model should say of its place from the
            tokens before, -100 where nothing can be known.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        return self._draw(n, torch.Generator().manual_seed(seed))

    def times(self, factor: float) -> Self:
        """The same task with sequences some `factor` times as long, and the same tokens."""
        return dataclasses.replace(self, **{self.grows: round(getattr(self, self.grows) * factor)})

    def fit(self, context: int) -> Self:
        """This task if its sequences fit into `context`, else the longest version of it that does.

        Raises:
            ValueError: if not even the shortest does.
        """
        fitting = self
        for size in range(getattr(self, self.grows), 0, -1):
            try:
                fitting = dataclasses.replace(self, **{self.grows: size})
            except ValueError:
                break  # smaller than the task can be
            if fitting.length <= context:
                return fitting
        raise ValueError(
            f"context must be at least {fitting.length} for synthetic:{self.name} ({fitting}), got {context}"
        )

    def __str__(self) -> str:
        sizes = (f"{getattr(self, f.name)} {f.name.replace('_', ' ')}" for f in dataclasses.fields(self))
        return ", ".join(sizes)


MOST_DRAWN = 2**29
"""Random numbers that are held to draw tokens without putting back: 6 GiB with their order."""


def nothing_asked(input_ids: Tensor) -> Tensor:
    """Labels of which none asks."""
    return torch.full_like(input_ids, IGNORE)


def permutations(n: int, size: int, generator: torch.Generator) -> Tensor:
    """(n, size), a random order in each row."""
    if n * size > MOST_DRAWN:
        raise ValueError(
            f"{n:,} sequences with tokens drawn from {size:,} take {12 * n * size / 2**30:.0f} GiB to draw; use "
            f"fewer kinds of tokens"
        )
    return torch.rand(n, size, generator=generator).argsort(1)

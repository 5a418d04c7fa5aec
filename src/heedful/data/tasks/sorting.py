"""The task "sorting": say again what was read, in order.

    BOS  c a b a  SEP  a a b c

What comes after SEP is labelled. Ids: BOS, SEP, a blank that does not occur, symbols in their order.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heedful.attention.config import option
from heedful.data.tasks.copying import FIRST_SYMBOL, asked_again
from heedful.data.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Sorting(Task):
    """Random symbols, some of them several times, to be said in order."""

    name: ClassVar[str] = "sorting"
    grows: ClassVar[str] = "symbols"
    least: ClassVar[dict[str, int]] = {"alphabet": 2}

    symbols: int = option(20, "symbols to sort")
    alphabet: int = option(32, "different symbols")

    @property
    def length(self) -> int:
        """The symbols twice, BOS, SEP."""
        return 2 * self.symbols + 2

    @property
    def vocab_size(self) -> int:
        """BOS, SEP, the blank, symbols."""
        return FIRST_SYMBOL + self.alphabet

    def _draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        symbols = FIRST_SYMBOL + torch.randint(self.alphabet, (n, self.symbols), generator=generator)
        return asked_again(symbols, symbols.sort(1).values)

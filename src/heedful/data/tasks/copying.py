"""The tasks "copy" and "selective copy": say again what was read, or those of it that count.

    copy             BOS  c a b  SEP  c a b
    selective copy   BOS  . c . . a b .  SEP  c a b

What comes after SEP is labelled. Ids: BOS, SEP, the blank, symbols.
Arjovsky et al., arXiv 1511.06464; Gu and Dao, Mamba, arXiv 2312.00752, section 4.1.1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heedful.attention.config import option
from heedful.data.tasks.task import BOS, Task, nothing_asked, permutations

SEP, BLANK, FIRST_SYMBOL = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """Random symbols, to be said again."""

    name: ClassVar[str] = "copy"
    grows: ClassVar[str] = "symbols"
    least: ClassVar[dict[str, int]] = {"alphabet": 2}

    symbols: int = option(24, "symbols to copy")
    alphabet: int = option(16, "different symbols")

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
        return asked_again(symbols, symbols)


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
    """Random symbols among blanks, to be said again without the blanks."""

    name: ClassVar[str] = "selective-copy"
    grows: ClassVar[str] = "places"
    least: ClassVar[dict[str, int]] = {"alphabet": 2}

    symbols: int = option(8, "symbols to copy")
    places: int = option(48, "tokens that are read, blanks among them")
    alphabet: int = option(16, "different symbols")

    def check(self) -> None:
        """No more symbols than places."""
        if self.symbols > self.places:
            raise ValueError(
                f"selective-copy needs a place for each of {self.symbols} symbols, got {self.places}"
            )

    @property
    def length(self) -> int:
        """Places, symbols, BOS, SEP."""
        return self.places + self.symbols + 2

    @property
    def vocab_size(self) -> int:
        """BOS, SEP, the blank, symbols."""
        return FIRST_SYMBOL + self.alphabet

    def _draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        symbols = FIRST_SYMBOL + torch.randint(self.alphabet, (n, self.symbols), generator=generator)
        places = permutations(n, self.places, generator)[:, : self.symbols].sort(1).values
        read = torch.full((n, self.places), BLANK).scatter_(1, places, symbols)
        return asked_again(read, symbols)


def asked_again(read: Tensor, answer: Tensor) -> dict[str, Tensor]:
    """BOS, what is read, SEP, and the answer, which is labelled; (n, ·) each."""
    n, asked = read.shape[0], read.shape[1] + 2
    parts = (torch.full((n, 1), BOS), read, torch.full((n, 1), SEP), answer)
    input_ids = torch.cat(parts, 1)
    labels = nothing_asked(input_ids)
    labels[:, asked:] = answer
    return {"input_ids": input_ids, "labels": labels}

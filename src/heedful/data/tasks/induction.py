"""The task "induction": what followed the mark the first time follows it again.

    BOS  c a # b d a  # b  c  # b

Random symbols with a mark `#` here and there. What follows its first appearance is what follows all later ones, and
is labelled there. Ids: BOS, `#`, symbols.
Olsson et al., arXiv 2209.11895; Gu and Dao, Mamba, arXiv 2312.00752, section 4.1.2 (asked once, at the end).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heedful.attention.config import option
from heedful.data.tasks.task import BOS, Task, nothing_asked, permutations

MARK, FIRST_SYMBOL = 1, 2


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Random symbols and marks, of which all but the first ask."""

    name: ClassVar[str] = "induction"
    grows: ClassVar[str] = "pairs"
    least: ClassVar[dict[str, int]] = {"alphabet": 2, "marks": 2, "pairs": 2}

    pairs: int = option(32, "pairs of tokens: a mark and a symbol, or two symbols")
    marks: int = option(5, "marks, the first included")
    alphabet: int = option(16, "different symbols")

    def check(self) -> None:
        """No more marks than pairs."""
        if self.marks > self.pairs:
            raise ValueError(f"induction needs a pair for each of {self.marks} marks, got {self.pairs}")

    @property
    def length(self) -> int:
        """The pairs, after BOS."""
        return 2 * self.pairs + 1

    @property
    def vocab_size(self) -> int:
        """BOS, the mark, symbols."""
        return FIRST_SYMBOL + self.alphabet

    def _draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        symbols = torch.randint(self.alphabet, (n, self.pairs, 2), generator=generator)
        tokens = FIRST_SYMBOL + symbols
        places = permutations(n, self.pairs, generator)[:, : self.marks].sort(1).values
        followers = tokens[torch.arange(n), places[:, 0], 1]
        tokens[:, :, 0].scatter_(1, places, MARK)
        tokens[:, :, 1].scatter_(1, places, followers[:, None].expand(-1, self.marks))
        labels = nothing_asked(tokens)
        labels[:, :, 1].scatter_(1, places[:, 1:], followers[:, None].expand(-1, self.marks - 1))
        begin = torch.full((n, 1), BOS)
        return {
            "input_ids": torch.cat((begin, tokens.flatten(1)), 1),
            "labels": torch.cat((nothing_asked(begin), labels.flatten(1)), 1),
        }

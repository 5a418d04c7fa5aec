"""The task "parity": whether the ones so far are even or odd in number, at every place.

    tokens   BOS  1    0    1    1    BOS
    said by       odd  odd  even odd

Ids: BOS, the bits 0 and 1, `even`, `odd`. As everywhere a label is said by the token before it; here it is not the
token of its own place, so that no answer is ever read: a model has to count.
Hahn, arXiv 1906.06755; Delétang et al., arXiv 2207.02098 (asked once, at the end).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heedful.attention.config import option
from heedful.data.tasks.task import BOS, Task, nothing_asked

ZERO, EVEN = 1, 3


@dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """Random bits; the parity of those so far is asked for after each."""

    name: ClassVar[str] = "parity"
    grows: ClassVar[str] = "bits"

    bits: int = option(40, "bits of a sequence")

    @property
    def length(self) -> int:
        """The bits, after BOS and before a last token whose label asks for the parity of all."""
        return self.bits + 2

    @property
    def vocab_size(self) -> int:
        """BOS, two bits, two answers."""
        return 5

    def _draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        bits = torch.randint(2, (n, self.bits), generator=generator)
        input_ids = torch.full((n, self.length), BOS)
        input_ids[:, 1:-1] = ZERO + bits
        labels = nothing_asked(input_ids)
        labels[:, 2:] = EVEN + bits.cumsum(1) % 2  # said by the last of the bits it counts
        return {"input_ids": input_ids, "labels": labels}

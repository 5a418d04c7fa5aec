"""The task "multi-query associative recall": say the value of a key, for many keys.

    BOS  a 3  b 7  c 1    x a y z b z c y
                            (3)   (7) (1)

Pairs of a key and a value first; then every key once more, among random tokens, and each has to say its value. The
value is the label of the next place, where a random token stands, so that no answer is ever read. Keys come back
soon rather than late: the gap before a query has a power law. Ids: BOS, keys, values; a random token is any.
Arora et al., Zoology, arXiv 2312.04927, section 4 and appendix E, whose settings are (length, pairs) = (64, 4),
(128, 8), (256, 16), (512, 64) with a vocabulary of 8,192.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heedful.attention.config import option
from heedful.data.tasks.task import BOS, Task, nothing_asked, permutations

POWER = 0.01
"""Of the gap before a query, as in Zoology."""


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Pairs of a key and a value, then every key once more."""

    name: ClassVar[str] = "mqar"
    grows: ClassVar[str] = "tokens"
    least: ClassVar[dict[str, int]] = {"vocabulary": 4, "tokens": 4}

    pairs: int = option(8, "pairs to remember")
    tokens: int = option(64, "tokens of a sequence after BOS, four or more for each pair")
    vocabulary: int = option(64, "keys and values together, half of them each")

    def check(self) -> None:
        """Room for pairs and queries, and keys for all pairs."""
        if 4 * self.pairs > self.tokens:
            raise ValueError(
                f"mqar needs four tokens for each pair: {4 * self.pairs} for {self.pairs} pairs, got {self.tokens} "
                f"tokens"
            )
        if self.pairs > self.vocabulary // 2:
            raise ValueError(
                f"mqar needs as many keys as pairs: a vocabulary of {2 * self.pairs} or more for {self.pairs} "
                f"pairs, got {self.vocabulary}"
            )

    @property
    def length(self) -> int:
        """BOS and the rest."""
        return self.tokens + 1

    @property
    def vocab_size(self) -> int:
        """BOS, keys, values."""
        return 1 + self.vocabulary

    def _draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        n_keys, pairs = self.vocabulary // 2, self.pairs
        keys = 1 + permutations(n, n_keys, generator)[:, :pairs]
        n_values = self.vocabulary - n_keys
        values = 1 + n_keys + torch.randint(n_values, (n, pairs), generator=generator)
        slots = (self.tokens - 2 * pairs) // 2  # of two tokens: a query, and where its answer belongs
        near = torch.arange(1, slots + 1, dtype=torch.float64) ** (POWER - 1)
        # The largest of u^(1/w) draws without replacement by weights w.
        lots = torch.rand(n, slots, generator=generator, dtype=torch.float64).log() / near
        at = 1 + 2 * pairs + 2 * lots.topk(pairs, 1).indices[:, torch.randperm(pairs, generator=generator)]

        input_ids = 1 + torch.randint(self.vocabulary, (n, self.length), generator=generator)
        input_ids[:, 0] = BOS
        input_ids[:, 1 : 2 * pairs + 1 : 2] = keys
        input_ids[:, 2 : 2 * pairs + 2 : 2] = values
        input_ids.scatter_(1, at, keys)
        labels = nothing_asked(input_ids)
        labels.scatter_(1, at + 1, values)
        return {"input_ids": input_ids, "labels": labels}

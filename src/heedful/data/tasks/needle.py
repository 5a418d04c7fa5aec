"""The task "needle": find a few facts in a lot of hay.

    BOS  . . . ! a 3 . . ! b 7 . . .   ? b 7  ? a 3

Needles `! key value` lie anywhere in random tokens; at the end every key is asked for, in random order, and the
values are labelled. Ids: BOS, `!`, `?`, keys, values, hay.
Kamradt's needle in a haystack, with several needles as in RULER, arXiv 2404.06654, section 3.1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heedful.attention.config import option
from heedful.data.tasks.task import BOS, Task, nothing_asked, permutations

NEEDLE, ASK, FIRST_KEY = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """Facts among random tokens, asked for at the end."""

    name: ClassVar[str] = "needle"
    grows: ClassVar[str] = "places"
    least: ClassVar[dict[str, int]] = {"values": 2}

    needles: int = option(4, "facts to remember")
    places: int = option(32, "places of three tokens: a needle, or hay")
    keys: int = option(16, "different keys")
    values: int = option(16, "values a key may have")
    hay: int = option(16, "different tokens of hay")

    def check(self) -> None:
        """Room and keys for all needles."""
        for name in ("places", "keys"):
            if self.needles > getattr(self, name):
                raise ValueError(
                    f"needle needs as many {name} as needles, {self.needles} or more; got {getattr(self, name)}"
                )

    @property
    def length(self) -> int:
        """Places and questions of three tokens, after BOS."""
        return 3 * (self.places + self.needles) + 1

    @property
    def vocab_size(self) -> int:
        """BOS, two marks, keys, values, hay."""
        return FIRST_KEY + self.keys + self.values + self.hay

    def _draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        first_value = FIRST_KEY + self.keys
        keys = FIRST_KEY + permutations(n, self.keys, generator)[:, : self.needles]
        values = first_value + torch.randint(self.values, (n, self.needles), generator=generator)
        hay = torch.randint(self.hay, (n, self.places, 3), generator=generator) + first_value + self.values
        places = permutations(n, self.places, generator)[:, : self.needles]
        needles = torch.stack((torch.full_like(keys, NEEDLE), keys, values), 2)
        read = hay.scatter(1, places[:, :, None].expand(-1, -1, 3), needles)

        order = permutations(n, self.needles, generator)
        asked_values = values.gather(1, order)
        asked = torch.stack((torch.full_like(keys, ASK), keys.gather(1, order), asked_values), 2)
        begin = torch.full((n, 1), BOS)
        input_ids = torch.cat((begin, read.flatten(1), asked.flatten(1)), 1)
        labels = nothing_asked(input_ids)
        labels[:, 3 * self.places + 3 :: 3] = asked_values
        return {"input_ids": input_ids, "labels": labels}

"""How large the logits of selective attention can be, and what follows for small weights."""

from typing import NamedTuple

import torch
from torch import Tensor

MANY = 0.75
"""Keys are left out where less than this share of them is needed; 0 = never."""


def few(needed: int, of: int) -> bool:
    """Whether so few keys are needed that copying those is cheaper than attending to all."""
    return needed < MANY * of


class Limits(NamedTuple):
    """What weighs nothing, and whether the exponentials can do without a maximum.

    A key whose weight is below exp(-margin) of its row's sum is lost in rounding, with room for a million such
    keys. It gets about that weight, never less: its true weight could be a denormal number, or become one in a
    product with a small gradient, and those slow a product down a hundred times.

    With logits up to b in size a row's sum is at least exp(-b), as its own token has F = 0. F may then be cut off
    at 2b + margin, and all weights lie between exp(-3b - margin) and exp(b): no maximum is needed if 3b + margin
    stays inside the numbers of the dtype.
    """

    margin: float
    bounded: bool
    """Whether the logits are that small."""
    largest_mask: float
    """Where F is cut off, if so."""

    @classmethod
    def of(cls, q: Tensor, k: Tensor, start: Tensor) -> "Limits":
        """From the lengths of queries and keys: no logit is larger than their product.

        Args:
            q: (B, H, T, D), scaled.
            k: (B, G, S, D).
            start: F before the first query, any shape; a negative one would be a logit of its own.
        """
        margin, reach = (30.0, 87.0) if q.dtype == torch.float32 else (60.0, 708.0)
        bound = 0.0
        if q.numel() and k.numel():
            queries = torch.linalg.vector_norm(q, dim=-1).amax((0, 2)).view(k.shape[1], -1)
            keys = torch.linalg.vector_norm(k, dim=-1).amax((0, 2))
            bound = float((queries * keys[:, None]).amax())
        small = 3 * bound + margin < reach and not bool((start < 0).any())  # NaN is not small
        return cls(margin, small, 2 * bound + margin)

    def cut_off(self, masks: Tensor, largest: Tensor) -> None:
        """Cut F (B, R, n, w) off where that is needed; none of it exceeds `largest`."""
        if self.bounded and float(largest.max()) > self.largest_mask:
            masks.clamp_(max=self.largest_mask)

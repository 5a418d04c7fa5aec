"""Decay of keys by forget gates: what each query subtracts from its logits, in two ways."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def decay_reference(steps: Tensor, earlier: Tensor | None, counts: Tensor) -> Tensor:
    """The decay of each key at each query: the sum of the steps of all tokens after the key, up to the query.

    Steps are only ever added, so nothing cancels.

    Args:
        steps: (B, H, T), minus the logarithm of each query's forget gate, 0 or more.
        earlier: (B, H, S' <= S), the decay of the first keys before these queries; None: 0, as of all others.
        counts: (1 or B, T, S) bool, the keys that each query's step counts for: never its own.

    Returns:
        (B, H, T, S).
    """
    total = torch.where(counts[:, None], steps[..., None], 0.0).cumsum(-2)
    return total if earlier is None else total + _padded(earlier, total.shape[-1])[:, :, None]


class RunningSums(NamedTuple):
    """Sums of steps along the text, of which `decay` takes differences instead of summing over (T, S).

    Such a difference is small where its two sums are large: after 8,000 tokens at f = 1/2 float32 rounds them to
    0.0005. So the sum is made in float64 and stands as two numbers of the working precision: what is left is the
    rounding of the difference itself.
    """

    high: Tensor
    """(B, H, S)."""
    low: Tensor
    """(B, H, S), what `high` has rounded off."""

    @classmethod
    def of(cls, steps: Tensor, segment_ids: Tensor | None) -> "RunningSums":
        """Of the steps of all keys.

        Args:
            steps: (B, H, S), one for each key; those of earlier calls are 0, and those of padding.
            segment_ids: (B, S) integers, or None; steps count within a segment.
        """
        sums = _running_sums(steps.double(), segment_ids)
        high = sums.to(steps.dtype)
        return cls(high, (sums - high).detach().to(steps.dtype))  # its gradient is there once, with `high`

    def decay(self, earlier: Tensor | None, start: int, end: int) -> Tensor:
        """`decay_reference` of the tokens from start to end, (B, H, end - start, end), for keys that they see.

        What it says of others means nothing. `earlier` is as there, (B, H, S - T).
        """
        high, low = (part[..., start:end, None] - part[..., None, :end] for part in self)
        decay = high + low
        return decay if earlier is None else decay + _padded(earlier, end)[:, :, None]

    def features(self, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
        """What goes before the features of queries and keys so that their product also holds minus the decay.

        Matrix products on a CPU add features up in their order: so the two large sums come first, whose difference
        is rounded as in `decay`.

        Returns:
            Two of (B, H, S, 4), of queries and of keys.
        """
        one = torch.ones_like(self.high)
        query = torch.stack([one, -self.high, one, -self.low], dim=-1)
        high, low = self
        if earlier is not None:
            exact = high.double() + low - _padded(earlier, high.shape[-1])
            high = exact.to(high.dtype)
            low = (exact - high).detach().to(high.dtype)
        return query, torch.stack([high, one, low, one], dim=-1)


def decay_after(steps: Tensor, earlier: Tensor | None, counts: Tensor) -> Tensor:
    """The decay of all keys after the last query, (B, H, S): the last row of `decay_reference`."""
    new = steps @ counts.to(steps.dtype)
    return new if earlier is None else new + _padded(earlier, new.shape[-1])


def _running_sums(steps: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Sums along the last axis whose differences within a segment are those of its own steps."""
    if segment_ids is None:
        return steps.cumsum(-1)
    # Equal ids need not be neighbours, so sort them together; a stable sort keeps their order.
    order = segment_ids.argsort(dim=-1, stable=True)[:, None].expand_as(steps)
    return torch.empty_like(steps).scatter(-1, order, steps.gather(-1, order).cumsum(-1))


def _padded(earlier: Tensor, n_keys: int) -> Tensor:
    return F.pad(earlier, (0, n_keys - earlier.shape[-1]))

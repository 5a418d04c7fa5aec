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
    """Sums of steps along the text, of whose differences decays are made, instead of sums over (T, S).

    Such a difference is small where its two sums are large: after 8,000 tokens at f = 1/2 float32 rounds them to
    0.0005. So the sums are made in float64, and stand for some queries as two numbers of the working precision,
    counted from the first of these queries: what is left is the rounding of the difference itself.
    """

    sums: Tensor
    """(B, H, S), float64."""
    segments: Tensor | None
    """(B, S), each key's segment as a number below S; None: all are one."""
    dtype: torch.dtype
    """The working precision."""

    @classmethod
    def of(cls, steps: Tensor, segment_ids: Tensor | None) -> "RunningSums":
        """Of the steps of all keys.

        Args:
            steps: (B, H, S), one for each key; those of earlier calls are 0, and those of padding.
            segment_ids: (B, S) integers, or None; steps count within a segment.
        """
        if segment_ids is None:
            return cls(steps.double().cumsum(-1), None, steps.dtype)
        # Equal ids need not be neighbours, so sort them together; a stable sort keeps their order.
        ids, order = segment_ids.sort(dim=-1, stable=True)
        numbers = F.pad((ids[:, 1:] != ids[:, :-1]).cumsum(-1), (1, 0))
        segments = torch.empty_like(order).scatter(-1, order, numbers)
        order = order[:, None].expand_as(steps)
        sums = steps.double().gather(-1, order).cumsum(-1)
        return cls(torch.empty_like(sums).scatter(-1, order, sums), segments, steps.dtype)

    def decay(self, earlier: Tensor | None, start: int, end: int) -> Tensor:
        """`decay_reference` of the tokens from start to end, (B, H, end - start, end), for keys that they see.

        What it says of others means nothing. `earlier` is as there, (B, H, S - T).
        """
        high, low = (x[..., start:, None] - x[..., None, :] for x in self._split(self._since(start, end)))
        decay = high + low
        return decay if earlier is None else decay + _padded(earlier, end)[:, :, None]

    def features(self, earlier: Tensor | None, start: int, end: int) -> tuple[Tensor, Tensor]:
        """What goes before the features of these queries and keys, so that their product holds minus the decay.

        A product that adds its features up in their order, as large ones on a CPU do, begins with the difference of
        two sums, and is as exact as `decay`. In another order it is off by the rounding of what is forgotten from
        the first of these queries to the last.

        Returns:
            Of the queries, (B, H, end - start, 4), and of the keys, (B, H, end, 4).
        """
        (high, low), (key_high, key_low) = self.split(earlier, start, end)
        one, key_one = torch.ones_like(high), torch.ones_like(key_high)
        queries = torch.stack([one, -high, one, -low], dim=-1)
        return queries, torch.stack([key_high, key_one, key_low, key_one], dim=-1)

    def split(
        self, earlier: Tensor | None, start: int, end: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Two numbers of each query from `start` to `end`, and two of each key before `end`.

        The decay is the difference of the first, plus that of the second.

        Returns:
            (B, H, end - start) twice, and (B, H, end) twice.
        """
        since = self._since(start, end)
        keys = since if earlier is None else since - _padded(earlier, end)
        return self._split(since[..., start:]), self._split(keys)

    def _since(self, start: int, end: int) -> Tensor:
        """The sums of the first `end` keys less that of the first query of their segment from `start` on."""
        sums = self.sums[..., :end]
        if self.segments is None:
            return sums - sums[..., start : start + 1].detach()
        queries = torch.arange(start, end, device=sums.device).expand(len(self.segments), -1)
        first = torch.full_like(self.segments, end - 1)
        first = first.scatter_reduce(1, self.segments[:, start:end], queries, "amin")
        first = first.gather(1, self.segments[:, :end])[:, None].expand_as(sums)
        return sums - sums.gather(-1, first).detach()

    def _split(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """As two numbers of the working precision; the gradient is there once, with the first."""
        high = sums.to(self.dtype)
        return high, (sums - high).detach().to(self.dtype)


def decay_after(steps: Tensor, earlier: Tensor | None, counts: Tensor) -> Tensor:
    """The decay of all keys after the last query, (B, H, S): the last row of `decay_reference`."""
    new = steps @ counts.to(steps.dtype)
    return new if earlier is None else new + _padded(earlier, new.shape[-1])


def _padded(earlier: Tensor, n_keys: int) -> Tensor:
    return F.pad(earlier, (0, n_keys - earlier.shape[-1]))

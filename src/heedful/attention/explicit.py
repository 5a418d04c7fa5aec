"""A base class of scores whose weights no fused kernel makes: all of them are written out."""

import torch
from torch import Tensor

from heedful.attention.score import EvictableScore
from heedful.ops.dot_product import repeat_kv
from heedful.ops.masks import visible_keys
from heedful.ops.precision import no_autocast

BLOCK = 256
"""Queries whose weights are in memory together."""


def query_blocks(length: int, size: int) -> list[tuple[int, int]]:
    """Where blocks of `size` of T queries start and end; of no queries, one block of none."""
    return [(start, min(start + size, length)) for start in range(0, max(length, 1), size)]


class ExplicitScore(EvictableScore):
    """A score that is its `logits` and its `weights`: write those two, and no state.

    In blocks of queries, each with the keys up to it: half of the work, and without gradients only one block's
    weights in memory. A backward pass needs all of them, (B, H, T, T) / 2.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum; shapes as in `Score.forward`."""
        length, n_keys = q.shape[2], k.shape[2]
        outputs = []
        size = max(length, 1) if self.config.impl == "reference" else BLOCK
        for start, end in query_blocks(length, size):
            last = n_keys - length + end
            real, ids = (None if mask is None else mask[:, :last] for mask in (key_mask, segment_ids))
            visible = visible_keys(end - start, last, real, ids, q.device)
            block = q[:, :, start:end], k[:, :, :last], v[:, :, :last]
            here = x[:, start:end]
            out, _ = self.attend(*block, x=here, state=state, visible=visible, voted=visible, scale=scale)
            outputs.append(out)
        return torch.cat(outputs, dim=2), {}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        visible: Tensor,
        voted: Tensor,
        scale: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum over the visible keys; nobody votes."""
        with no_autocast(q.device):
            logits = self.logits(q, k, x=x, state=state, voted=voted, scale=scale)
            weights = self.weights(logits, visible[:, None])
            return (weights @ repeat_kv(v, q.shape[1]).to(weights.dtype)).to(v.dtype), {}

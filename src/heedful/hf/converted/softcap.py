"""Scores whose logits are drawn into ±cap by `cap tanh(L / cap)`, as in Gemma 2.

No fused kernel of ours does that: all logits of a piece are in memory, as in transformers' own eager attention.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heedful.attention.score import EvictableScore, Score, Select, given
from heedful.attention.selective import SelectiveScore
from heedful.attention.softmax import SoftmaxScore
from heedful.ops.dot_product import masked_softmax, repeat_kv
from heedful.ops.masks import rank_in_segment, visible_keys, voted_keys
from heedful.ops.precision import wide_dtype
from heedful.ops.selective.reference import per_head, soft_masks


class CappedSoftmaxScore(SoftmaxScore):
    """`softmax(cap tanh(L / cap)) v`."""

    softcap: float

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
        select: Select = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Over everything so far; shapes as in `Score.forward`."""
        visible = visible_keys(q.shape[2], k.shape[2], key_mask, segment_ids, q.device)
        voted = voted_keys(visible, rank_in_segment(k.shape[2], key_mask, segment_ids, q.device))
        return self.attend(
            q, k, v, x=x, state=state, visible=visible, voted=voted, scale=scale, **given(select)
        )

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
        select: Select = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Over the visible keys."""
        return self._weighted(self._logits(q, k, scale), v, visible), {}

    def attend_slots(self, *qkv: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Over all slots."""
        return EvictableScore.attend_slots(self, *qkv, **rest)

    def logits(self, q: Tensor, k: Tensor, *, scale: float, **rest: Any) -> Tensor:
        """(B, H, T, S)."""
        return self._logits(q, k, scale)

    def _logits(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return capped(q, k, scale, self.softcap)

    def _weighted(self, logits: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        weights = masked_softmax(logits, visible[:, None])
        return (weights @ repeat_kv(v, logits.shape[1]).to(logits.dtype)).to(v.dtype)


class CappedSelectiveScore(CappedSoftmaxScore, SelectiveScore):  # type: ignore[misc]
    """`softmax(cap tanh(L / cap) - F) v`; the votes of head 0 are capped too, those of added heads are not."""

    config: SelectiveScore.Config

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
        select: Select = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Over the visible keys."""
        logits = self._logits(q, k, scale)
        masks = soft_masks(self._votes(q, k, select, scale), state.get("soft_mask"), voted)
        if self.config.subtract:
            logits = logits - per_head(masks[:, :, :-1], q.shape[1])
        return self._weighted(logits, v, visible), {"soft_mask": masks[:, :, -1].clone()}

    def attend_pruned(self, *qkv: Tensor, evict: Callable[..., Tensor | None], **rest: Any) -> Any:
        """Over what is left."""
        return EvictableScore.attend_pruned(self, *qkv, evict=evict, **rest)

    def running_state(
        self,
        q: Tensor,
        k: Tensor,
        state: dict[str, Tensor],
        voted: Tensor,
        scale: float,
        select: Select = None,
    ) -> Tensor:
        """F before every query, (B, T, S)."""
        return soft_masks(self._votes(q, k, select, scale), state.get("soft_mask"), voted)[:, 0, :-1]

    def logits(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        voted: Tensor,
        scale: float,
        select: Select = None,
    ) -> Tensor:
        """(B, H, T, S)."""
        logits = self._logits(q, k, scale)
        if not self.config.subtract:
            return logits
        return logits - self.running_state(q, k, state, voted, scale, select)[:, None]

    def _votes(self, q: Tensor, k: Tensor, select: Select, scale: float) -> Tensor:
        return (
            self._logits(q[:, :1], k[:, :1], scale)
            if select is None
            else self._select_logits(q, k, select, scale)
        )


def capped_window(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """The source's own attention in a layer with a sliding window, q (B, H, T, D) -> (B, T, H, E).

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D).
        v: (B, G, S, E).
        mask: (B, 1, T, S) bool, the window; None: every key is seen.
        scale: multiplies the logits.
        cap: what they are drawn into.
    """
    visible = q.new_ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
    weights = masked_softmax(capped(q, k, scale, cap), visible)
    return (weights @ repeat_kv(v, q.shape[1]).to(weights.dtype)).to(v.dtype).transpose(1, 2)


def capped(q: Tensor, k: Tensor, scale: float, cap: float) -> Tensor:
    """(B, H, T, S), `cap tanh(q k^T scale / cap)`, float32 or wider."""
    dtype = wide_dtype(q)
    logits = q.to(dtype) @ repeat_kv(k, q.shape[1]).to(dtype).mT * scale
    return torch.tanh(logits / cap) * cap


_CAPPED = {SoftmaxScore: CappedSoftmaxScore, SelectiveScore: CappedSelectiveScore}


def cap_logits(score: Score, cap: float) -> None:
    """Make a score cap its logits.

    Raises:
        ValueError: for a score that cannot.
    """
    capped: Any = _CAPPED.get(type(score))  # type: ignore[arg-type]
    if capped is None:
        raise ValueError(
            f"this model caps its logits at {cap}, which score {score.config.form!r} does not know; use "
            f"'selective' or 'softmax'"
        )
    score.__class__ = capped
    score.softcap = cap  # type: ignore[assignment]

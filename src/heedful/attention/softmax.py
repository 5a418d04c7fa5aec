"""Plain softmax attention."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heedful.attention.config import ScoreConfig
from heedful.attention.registry import register_score
from heedful.attention.score import EvictableScore, Select
from heedful.ops.causal import causal_attention
from heedful.ops.dot_product import attention_reference, attention_sdpa, wide_logits
from heedful.ops.masks import visible_keys
from heedful.ops.precision import no_autocast


@register_score("softmax")
class SoftmaxScore(EvictableScore):
    """softmax(q k^T / sqrt(D)) v: nothing else happens to the logits."""

    bilinear = True
    formula = "out[i] = sum_{j<=i} softmax_j(q_i . k_j / sqrt(D)) v_j"

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        """Plain softmax over the logits.

        Vaswani et al., arXiv 1706.03762.
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
        """`softmax(q k^T * scale) v`; shapes as in `Score.forward`."""
        length, n_keys = q.shape[2], k.shape[2]
        reference = self.config.impl == "reference"
        if key_mask is None and segment_ids is None and not reference and length in (1, n_keys):
            # A single query sees every key; a whole square needs no mask in memory.
            return causal_attention(q, k, v, scale, impl=self.config.impl), {}
        visible = visible_keys(length, n_keys, key_mask, segment_ids, q.device)
        return self.attend(q, k, v, x=x, state=state, visible=visible, voted=visible, scale=scale)

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
        """`softmax(q k^T * scale) v` over the visible keys; nobody votes."""
        if self.config.impl == "reference":
            with no_autocast(q.device):
                return attention_reference(q, k, v, visible, scale), {}
        alive = visible.any(-1, keepdim=True)
        out = attention_sdpa(q, k, v, scale, mask=(visible | ~alive)[:, None])
        return out.masked_fill(~alive[:, None], 0.0), {}

    def attend_slots(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        positions: Tensor,
        newest: Tensor,
        scale: float,
        grace: int = 1,
        first: int = 1,
        select: Select = None,
    ) -> tuple[Tensor, None]:
        """`softmax(q k^T * scale) v` over all slots."""
        visible = torch.ones_like(positions, dtype=torch.bool)[:, None]
        if self.config.impl == "reference":
            return attention_reference(q, k, v, visible, scale), None
        return attention_sdpa(q, k, v, scale), None

    def logits(self, q: Tensor, k: Tensor, *, scale: float, **rest: Any) -> Tensor:
        """`q k^T * scale`, (B, H, T, S)."""
        return wide_logits(q, k, scale)

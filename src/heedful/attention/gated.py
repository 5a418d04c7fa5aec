"""Gated attention as a Score: every head's output times a sigmoid of the token."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from heedful.attention.config import ScoreConfig
from heedful.attention.registry import register_score
from heedful.attention.score import EvictableScore
from heedful.attention.softmax import SoftmaxScore


@register_score("gated")
class GatedScore(EvictableScore):
    """Softmax attention whose heads a token can close: the gate is computed from `x`, one number per head."""

    bilinear = True
    formula = """
        out^h[i] = sigmoid(w^h . x_i) sum_{j<=i} softmax_j(q^h_i . k^h_j / sqrt(D)) v^h_j
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        """Softmax attention with a head-specific sigmoid gate on the output: H·C parameters.

        Qiu et al., arXiv 2505.06708, NeurIPS 2025, the head-wise form after the weighted sum.
        """

        def parameter_count(self, n_heads: int, d_model: int) -> int:
            """H·C."""
            return n_heads * d_model

        def flops_per_token(self, context: int, n_heads: int, qk_dim: int, v_dim: int, d_model: int) -> int:
            """Those of softmax, and the gate's."""
            return super().flops_per_token(context, n_heads, qk_dim, v_dim, d_model) + 2 * n_heads * d_model

    def __init__(self, config: ScoreConfig, n_heads: int, d_model: int) -> None:
        super().__init__(config, n_heads, d_model)
        self.softmax = SoftmaxScore(config, n_heads, d_model)
        self.gate_proj = nn.Linear(d_model, n_heads, bias=False)

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
        """Softmax attention, gated; shapes as in `Score.forward`."""
        masks = {"key_mask": key_mask, "segment_ids": segment_ids}
        out, state = self.softmax(q, k, v, x=x, state=state, scale=scale, **masks)
        return self._gated(out, x), state

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, **rest: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Softmax attention over the visible keys, gated."""
        out, state = self.softmax.attend(q, k, v, x=x, **rest)
        return self._gated(out, x), state

    def attend_slots(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, **rest: Any) -> tuple[Tensor, None]:
        """Softmax attention over all slots, gated."""
        out, _ = self.softmax.attend_slots(q, k, v, x=x, **rest)
        return self._gated(out, x), None

    def logits(self, q: Tensor, k: Tensor, **rest: Any) -> Tensor:
        """Those of softmax: the gate is no part of them."""
        return self.softmax.logits(q, k, **rest)

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        """(B, H, T, E) times the gates of x (B, T, C)."""
        gate = self.gate_proj(x).sigmoid().transpose(1, 2)
        return out * gate[..., None].to(out.dtype)

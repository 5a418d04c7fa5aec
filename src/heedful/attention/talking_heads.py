"""Talking-heads attention: heads are mixed before and after the softmax."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heedful.attention.config import ScoreConfig, option
from heedful.attention.explicit import ExplicitScore
from heedful.attention.init import fill_
from heedful.attention.registry import register_score
from heedful.ops.dot_product import masked_softmax, wide_logits


@register_score("talking_heads")
class TalkingHeadsScore(ExplicitScore):
    """Softmax attention whose heads talk: two learned H x H matrices mix the logits and the weights.

    Both start as the identity, without noise: it equals softmax attention then, at the same size of logits, and no
    two heads are alike that noise would have to part. Weight decay leaves them alone. No fused kernel knows
    mixed heads, so all logits are in memory (`ExplicitScore`). After mixing, a weight may be negative; a
    policy that evicts by attention looks at its size.
    """

    formula = """
        M^h[i,j] = sum_g P[h,g] q^g_i . k^g_j / sqrt(D)
        A^h[i,j] = sum_g W[h,g] softmax_{j<=i}(M^g[i,j])
        out^h[i] = sum_{j<=i} A^h[i,j] v^h_j
    """

    bilinear = True

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        """Talking heads: logits and weights are mixed across heads by learned matrices, 2·H² parameters.

        Shazeer et al., arXiv 2003.02436. Starts as plain softmax. All logits are in memory while it trains.
        """

        implementations: ClassVar[tuple[str, ...]] = ("auto", "reference")

        impl: str = option(
            "auto", "how it is computed: auto (by blocks of queries) or reference (all at once)"
        )

        def parameter_count(self, n_heads: int, d_model: int) -> int:
            """2·H²."""
            return 2 * n_heads**2

        def flops_per_token(self, context: int, n_heads: int, qk_dim: int, v_dim: int, d_model: int) -> int:
            """Those of softmax, and of two mixtures of H numbers per key and head."""
            return (
                super().flops_per_token(context, n_heads, qk_dim, v_dim, d_model) + 4 * context * n_heads**2
            )

    def __init__(self, config: ScoreConfig, n_heads: int, d_model: int) -> None:
        super().__init__(config, n_heads, d_model)
        self.mix_logits = nn.Parameter(torch.eye(n_heads))
        self.mix_weights = nn.Parameter(torch.eye(n_heads))

    def reset_parameters(self) -> None:
        """The identity."""
        for mixture in self.identity_parameters():
            fill_(mixture, torch.eye(self.n_heads))

    def identity_parameters(self) -> list[Tensor]:
        """Both matrices."""
        return [self.mix_logits, self.mix_weights]

    def logits(self, q: Tensor, k: Tensor, *, scale: float, **rest: Any) -> Tensor:
        """Mixed, (B, H, T, S)."""
        return mixed(self.mix_logits, wide_logits(q, k, scale))

    def weights(self, logits: Tensor, visible: Tensor) -> Tensor:
        """The softmax over the visible keys, mixed."""
        return mixed(self.mix_weights, masked_softmax(logits, visible))


def mixed(mixture: Tensor, x: Tensor) -> Tensor:
    """(B, H, ..., S) with heads mixed by (H, H)."""
    return (mixture.to(x.dtype) @ x.flatten(2)).view_as(x)

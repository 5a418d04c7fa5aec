"""Sigmoid attention: every key is weighed by itself."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from heedful.attention.config import ScoreConfig, check_whole, option
from heedful.attention.explicit import ExplicitScore
from heedful.attention.registry import register_score
from heedful.ops.dot_product import wide_logits


@register_score("sigmoid")
class SigmoidScore(ExplicitScore):
    """sigmoid(q k^T / sqrt(D) - log n) v: weights do not compete, and need not sum to 1.

    The paper and its authors' code take the context that is trained on for n (`bias_length`). A causal query sees
    fewer keys than that, and at generation more, so by default n is the number of keys that the query sees: weights
    sum to about 1 at any length. Under a budget those are the keys held, as after a text of that length; with
    `bias_length` the weight of a key never depends on who else is held.
    """

    formula = """
        out^h[i] = sum_{j<=i} sigmoid(q^h_i . k^h_j / sqrt(D) - log n) v^h_j
        n        = the keys that query i sees, or `bias_length`
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        """Sigmoid attention: the softmax is a sigmoid of each logit, less log n. No parameters.

        Ramapuram et al., arXiv 2409.04431, ICLR 2025. All logits are in memory while it trains.
        """

        implementations: ClassVar[tuple[str, ...]] = ("auto", "reference")

        impl: str = option(
            "auto", "how it is computed: auto (by blocks of queries) or reference (all at once)"
        )
        bias_length: int | None = option(
            None, "n in the bias -log n, as the paper's length of the context; the keys a query sees if None"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            check_whole("bias_length", self.bias_length)

    config: Config
    bilinear = True

    def logits(self, q: Tensor, k: Tensor, *, scale: float, **rest: Any) -> Tensor:
        """`q k^T * scale`, (B, H, T, S), without the bias."""
        return wide_logits(q, k, scale)

    def weights(self, logits: Tensor, visible: Tensor) -> Tensor:
        """`sigmoid(logits - log n)` at the visible keys, 0 elsewhere."""
        fixed = self.config.bias_length
        n = visible.sum(-1, keepdim=True).clamp(min=1) if fixed is None else torch.tensor(fixed)
        return (logits - n.to(logits.dtype).log()).sigmoid().masked_fill(~visible, 0.0)

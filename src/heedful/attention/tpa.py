"""TPA, tensor product attention: queries, keys and values as short sums of rank-one products."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heedful.attention.base import Attention
from heedful.attention.config import AttentionConfig, check_whole, option
from heedful.attention.gqa import fixed_kv_heads
from heedful.attention.registry import register_attention
from heedful.ops.rope import rope


@dataclass(frozen=True)
class TPAConfig(AttentionConfig):
    """Tensor product attention: q, k and v are means of products of a vector over heads and one over features.

    Zhang et al., arXiv 2501.06425. Both factors are linear in the token. What is cached are those of keys and
    values, (k_rank + v_rank)(H + D) values per token; keys and values are made of them when read. A rotated
    factor over features is that of rotated heads, so that it is cached rotated. No QK-norm, as in the paper.
    """

    q_rank: int = option(6, "products that the queries of a token are the mean of")
    k_rank: int = option(2, "products that the keys of a token are the mean of")
    v_rank: int = option(2, "products that the values of a token are the mean of")

    no_qk_norm: ClassVar[str] = "the norm of a key is not that of the factors that are cached"

    kv_heads_by_definition = True

    def resolve_kv_heads(self) -> int:
        """G = H."""
        return fixed_kv_heads("tpa", self.n_kv_heads, self.n_heads)

    def check(self) -> None:
        """Ranks are whole numbers."""
        for name in ("q_rank", "k_rank", "v_rank"):
            check_whole(name, getattr(self, name))
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be a whole number >= 1, got None")

    @property
    def score_kv_heads(self) -> int:
        """1: the factors are all heads'."""
        return 1

    def parameter_count(self) -> int:
        """Both factors of q, k and v, and what the base class holds."""
        return self._rows * (self.d_model + self.bias) + self.shared_parameter_count()

    def flops_per_token(self, context: int) -> int:
        """Both factors of q, k and v, their products, and what the base class does."""
        products = self._ranks * self.n_heads * self.size
        return 2 * (self._rows * self.d_model + products) + self.shared_flops_per_token(context)

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """(k_rank + v_rank)(H + D) values, and the score's state."""
        state = self.score_config.state_bytes_per_token(self.score_heads, bytes_per_value)
        return (self.k_rank + self.v_rank) * (self.n_heads + self.size) * bytes_per_value + state

    @property
    def _ranks(self) -> int:
        return self.q_rank + self.k_rank + self.v_rank

    @property
    def _rows(self) -> int:
        return self._ranks * (self.n_heads + self.size)


@register_attention("tpa")
class TensorProductAttention(Attention):
    """Queries, keys and values, (H, D) matrices of a token, of the ranks that the config says."""

    Config = TPAConfig
    formula = """
        q = 1/R sum_r a_r(x) b_r(x)^T      (H, D), R = q_rank; k, v alike with k_rank, v_rank
        a_r(x) = W_a^r x     b_r(x) = rope(W_b^r x), for v without rope
        out = W_o concat_h score(q^h, k^h) v^h
    """
    config: TPAConfig
    q_features: nn.Linear

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        c = self.config
        for name, rank in self._by_rank().items():
            for factor, size in (("heads", c.n_heads), ("features", c.size)):
                setattr(self, f"{name}_{factor}", nn.Linear(c.d_model, rank * size, bias=c.bias))
        self.reset_parameters()

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Q (B, H, T, D), and the factors of k and v: (B, R, T, H) beside (B, R, T, D), in one tensor each."""
        q, k, v = (self._factors(name, x, None if name == "v" else positions) for name in "qkv")
        return self._heads(q), {"k": k, "v": v}

    def keys_values(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The keys and values of every head."""
        return self._heads(memory["k"]), self._heads(memory["v"])

    def logit_projections(self) -> list[nn.Linear]:
        """That of the queries' features, which `reset_parameters` starts smaller."""
        return [self.q_features]

    def reset_parameters(self) -> None:
        """Fresh weights: each W^r uniform (Xavier), as in the paper; those of q such that logits start as asked."""
        super().reset_parameters()
        c = self.config
        for name, rank in self._by_rank().items():
            for factor, size in (("heads", c.n_heads), ("features", c.size)):
                weight = getattr(self, f"{name}_{factor}").weight
                bound = (6 / (c.d_model + size)) ** 0.5
                if (name, factor) == ("q", "features"):
                    # For x of unit variance a factor has that of 2 C / (C + size), and a mean of R products 1/R.
                    variance = 4 * c.d_model**2 / ((c.d_model + c.n_heads) * (c.d_model + c.size))
                    bound *= c.init_logit_std * (rank * c.k_rank) ** 0.5 / variance
                nn.init.uniform_(weight, -bound, bound)

    def _by_rank(self) -> dict[str, int]:
        return {"q": self.config.q_rank, "k": self.config.k_rank, "v": self.config.v_rank}

    def _factors(self, name: str, x: Tensor, positions: Tensor | None) -> Tensor:
        """(B, R, T, H + D)."""
        rank = self._by_rank()[name]
        heads, features = (
            self.split_heads(getattr(self, f"{name}_{factor}")(x), rank) for factor in ("heads", "features")
        )
        if positions is not None and self.config.rope:
            features = rope(features, positions, theta=self.config.rope_theta)
        return torch.cat((heads, features), dim=-1)

    def _heads(self, factors: Tensor) -> Tensor:
        """(B, R, S, H + D) -> (B, H, S, D), the mean of the products."""
        heads, features = factors.permute(0, 2, 3, 1).split([self.config.n_heads, self.config.size], dim=2)
        return (heads / factors.shape[1] @ features.mT).transpose(1, 2)

"""Multi-head, multi-query and grouped-query attention: one class, three names."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from heedful.attention.base import Attention
from heedful.attention.config import AttentionConfig
from heedful.attention.registry import register_attention


@dataclass(frozen=True)
class GQAConfig(AttentionConfig):
    """Grouped-query attention: neighbouring query heads share one of G key/value heads.

    Ainslie et al., arXiv 2305.13245. The cache holds 2·G·D values per token.
    """

    def resolve_kv_heads(self) -> int:
        """G must be said."""
        if self.n_kv_heads is None:
            few = next((n for n in range(2, self.n_heads) if self.n_heads % n == 0), 1)
            raise ValueError(
                f"attention 'gqa' needs n_kv_heads, a divisor of n_heads ({self.n_heads}); 'mha' has "
                f"{self.n_heads}, 'mqa' has 1; use n_kv_heads={few} (on the command line: --n-kv-heads {few})"
            )
        return self.n_kv_heads

    def parameter_count(self) -> int:
        """(H + 2G)·D·C for q, k, v, and what the base class holds."""
        rows = (self.n_heads + 2 * self.kv_heads) * self.size
        return rows * (self.d_model + self.bias) + self.shared_parameter_count()

    def flops_per_token(self, context: int) -> int:
        """2·(H + 2G)·D·C for q, k, v, and what the base class does."""
        rows = (self.n_heads + 2 * self.kv_heads) * self.size
        return 2 * rows * self.d_model + self.shared_flops_per_token(context)

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """2·G·D values, and the score's state."""
        state = self.score_config.state_bytes_per_token(self.score_heads, bytes_per_value)
        return 2 * self.kv_heads * self.size * bytes_per_value + state


@dataclass(frozen=True)
class MHAConfig(GQAConfig):
    """Multi-head attention, the standard: every query head has its own key/value head.

    Vaswani et al., arXiv 1706.03762. The cache holds 2·H·D values per token.
    """

    kv_heads_by_definition = True

    def resolve_kv_heads(self) -> int:
        """G = H."""
        return fixed_kv_heads("mha", self.n_kv_heads, self.n_heads)


@dataclass(frozen=True)
class MQAConfig(GQAConfig):
    """Multi-query attention: all query heads share one key/value head.

    Shazeer, arXiv 1911.02150. The cache holds 2·D values per token.
    """

    kv_heads_by_definition = True

    def resolve_kv_heads(self) -> int:
        """G = 1."""
        return fixed_kv_heads("mqa", self.n_kv_heads, 1)


def fixed_kv_heads(name: str, given: int | None, expected: int) -> int:
    """`expected`, unless `given` contradicts it."""
    if given not in (None, expected):
        raise ValueError(
            f"attention {name!r} has {expected} key/value heads by definition, got n_kv_heads={given}; "
            f"leave it out or use attention 'gqa'"
        )
    return expected


@register_attention("gqa", config=GQAConfig)
@register_attention("mqa", config=MQAConfig)
@register_attention("mha", config=MHAConfig)
class GroupedQueryAttention(Attention):
    """Linear q, k and v, heads side by side; see the configs for the three names it goes by."""

    Config = GQAConfig
    formula = """
        q^h = W_q^h x     k^g = W_k^g x     v^g = W_v^g x          h < H, g < G
        out = W_o concat_h score(q^h, k^(h G // H)) v^(h G // H)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        kv_size = config.kv_heads * config.size
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.size, bias=config.bias)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=config.bias)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=config.bias)
        self.reset_parameters()

    def logit_projections(self) -> list[nn.Linear]:
        """Of queries and of keys."""
        return [self.q_proj, self.k_proj]

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Q (B, H, T, D); k and v (B, G, T, D)."""
        q = self.split_heads(self.q_proj(x), self.config.n_heads)
        k = self.split_heads(self.k_proj(x), self.config.kv_heads)
        v = self.split_heads(self.v_proj(x), self.config.kv_heads)
        return self.place_queries(q, positions), {"k": self.place_keys(k, positions), "v": v}

"""MLA, multi-head latent attention: keys and values of all heads from one small latent per token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heedful.attention.base import as_wide_as_gains
from heedful.attention.config import AttentionConfig, check_whole, option
from heedful.attention.folding import Folding
from heedful.attention.gqa import fixed_kv_heads
from heedful.attention.registry import register_attention
from heedful.ops.rope import rope


@dataclass(frozen=True)
class MLAConfig(AttentionConfig):
    """Multi-head latent attention: what is cached is one latent per token, shared by all heads.

    DeepSeek-AI, arXiv 2405.04434 (DeepSeek-V2). The latent makes the keys and values of every head; one more key of
    a few features, shared by the heads, carries the positions. The cache holds kv_lora_rank + rope_head_dim values
    per token, whatever H is. A query or key has head_dim features without and rope_head_dim with positions, a value
    head_dim. No QK-norm: the latents are normed instead. With `bias`, what reads x has one, and what reads a latent
    has none.
    """

    kv_lora_rank: int | None = option(
        None, "size of the latent that keys and values are made of; 4 x head_dim if None"
    )
    q_lora_rank: int | None = option(None, "size of a latent that queries are made of; None: of x itself")
    rope_head_dim: int | None = option(
        None, "features of a query or key that carry positions, even; head_dim / 2 if None"
    )

    rotated_dim_name: ClassVar[str] = "rope_head_dim"
    no_qk_norm: ClassVar[str] = "the norm of a key is not linear in the latent that is cached"

    kv_heads_by_definition = True

    def resolve_kv_heads(self) -> int:
        """G = H."""
        return fixed_kv_heads("mla", self.n_kv_heads, self.n_heads)

    def check(self) -> None:
        """Fill in the sizes."""
        for name in ("kv_lora_rank", "q_lora_rank", "rope_head_dim"):
            check_whole(name, getattr(self, name))
        if self.kv_lora_rank is None:
            self._set("kv_lora_rank", 4 * self.size)
        if self.rope_head_dim is None:
            self._set("rope_head_dim", 2 * -(-self.size // 4))

    @property
    def latent(self) -> int:
        """R, the size of the latent."""
        assert self.kv_lora_rank is not None
        return self.kv_lora_rank

    @property
    def rotated_dim(self) -> int:
        """The features that carry positions."""
        assert self.rope_head_dim is not None
        return self.rope_head_dim

    @property
    def qk_dim(self) -> int:
        """The features of a query or key, with and without positions."""
        return self.size + self.rotated_dim

    @property
    def score_kv_heads(self) -> int:
        """1: the latent is all heads'."""
        return 1

    def parameter_count(self) -> int:
        """Projections of x, their norms, projections of the latents, and what the base class holds."""
        rows, from_latents = self._rows_and_products()
        norms = self.latent + (self.q_lora_rank or 0)
        return rows * (self.d_model + self.bias) + from_latents + norms + self.shared_parameter_count()

    def flops_per_token(self, context: int) -> int:
        """Projections of x and of the latents, and what the base class does."""
        rows, from_latents = self._rows_and_products()
        return 2 * (rows * self.d_model + from_latents) + self.shared_flops_per_token(context)

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """kv_lora_rank + rope_head_dim values, and the score's state."""
        state = self.score_config.state_bytes_per_token(self.score_heads, bytes_per_value)
        return (self.latent + self.rotated_dim) * bytes_per_value + state

    def _rows_and_products(self) -> tuple[int, int]:
        """Rows of the matrices that read x, and the entries of those that read a latent."""
        queries = self.n_heads * self.qk_dim
        rows = self.latent + self.rotated_dim + (self.q_lora_rank or queries)
        return rows, (self.q_lora_rank or 0) * queries + 2 * self.latent * self.n_heads * self.size


@register_attention("mla")
class LatentAttention(Folding):
    """Queries per head, keys and values from one normed latent c and one rotated key r per token.

    Training and prompts make the keys and values of every head. A single token after a cache does not ("absorbed"
    weights): W_k goes into its query and W_v behind the weighted sum, so that the cache is read as one key head
    [c; r] whose values are c.
    """

    Config = MLAConfig
    formula = """
        c = norm(W_c x)     r = rope(W_r x)                              cached
        q^h = [W_q^h u; rope(W_p^h u)]     u = x, or norm(W_u x) with q_lora_rank
        k^h = [W_k^h c; r]     v^h = W_v^h c
        out = W_o concat_h score(q^h, k^h) v^h
        one token:  q^h . k^h = [(W_k^h)^T q_1^h; q_2^h] . [c; r]     W_v^h moves behind the sum
    """
    config: MLAConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        c = self.config
        queries = c.n_heads * c.qk_dim
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(c.d_model, queries, bias=c.bias)
        else:
            self.q_down = nn.Linear(c.d_model, c.q_lora_rank, bias=c.bias)
            self.q_latent_norm = nn.RMSNorm(c.q_lora_rank, eps=c.norm_eps)
            self.q_up = nn.Linear(c.q_lora_rank, queries, bias=False)
        self.kv_down = nn.Linear(c.d_model, c.latent + c.rotated_dim, bias=c.bias)
        self.kv_latent_norm = nn.RMSNorm(c.latent, eps=c.norm_eps)
        self.k_up = nn.Linear(c.latent, c.n_heads * c.size, bias=False)
        self.v_up = nn.Linear(c.latent, c.n_heads * c.size, bias=False)
        self.reset_parameters()

    def logit_projections(self) -> list[nn.Linear]:
        """That of the queries alone: keys are made of what values are made of."""
        return [self.q_proj if self.config.q_lora_rank is None else self.q_up]

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Q (B, H, T, D + P) and the latent with the rotated key behind it, (B, 1, T, R + P)."""
        c = self.config
        if c.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_up(self.q_latent_norm(as_wide_as_gains(self.q_down(x), self.q_latent_norm)))
        q, q_turned = self.split_heads(q, c.n_heads).split([c.size, c.rotated_dim], dim=-1)
        latent, key = self.kv_down(x).split([c.latent, c.rotated_dim], dim=-1)
        latent = self.kv_latent_norm(as_wide_as_gains(latent, self.kv_latent_norm))[:, None]
        key = self._turned(key[:, None], positions).to(latent.dtype)
        memory = torch.cat((latent, key), dim=-1)
        return torch.cat((q, self._turned(q_turned, positions)), dim=-1), {"latent": memory}

    def keys_values(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The keys and values of every head."""
        c = self.config
        latent, key = memory["latent"].split([c.latent, c.rotated_dim], dim=-1)
        k = self.split_heads(self.k_up(latent[:, 0]), c.n_heads)
        v = self.split_heads(self.v_up(latent[:, 0]), c.n_heads)
        return torch.cat((k, key.to(k.dtype).expand(-1, c.n_heads, -1, -1)), dim=-1), v

    def folded_layers(self) -> list[nn.Module]:
        """The maps from the latent to keys and values."""
        return [self.k_up, self.v_up]

    def fold_queries(self, q: Tensor) -> Tensor:
        """(B, H, 1, D + P) -> (B, H, 1, R + P)."""
        c = self.config
        q, turned = q.split([c.size, c.rotated_dim], dim=-1)
        return torch.cat((q @ self._by_head(self.k_up), turned), dim=-1)

    def read_memory(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The latent with the rotated key, as keys and as values: to cut that off would copy all the rest."""
        return memory["latent"], memory["latent"]

    def unfold(self, out: Tensor) -> Tensor:
        """(B, H, 1, R + P) -> (B, H, 1, D)."""
        return out[..., : self.config.latent] @ self._by_head(self.v_up).mT

    def reset_parameters(self) -> None:
        """Fresh weights; the norms of the latents start at 1."""
        super().reset_parameters()
        nn.init.ones_(self.kv_latent_norm.weight)
        if self.config.q_lora_rank is not None:
            nn.init.ones_(self.q_latent_norm.weight)

    def _by_head(self, layer: nn.Linear) -> Tensor:
        """(H, D, R), the matrices of a map from the latent."""
        return layer.weight.unflatten(0, (self.config.n_heads, -1))

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return rope(x, positions, theta=self.config.rope_theta) if self.config.rope else x

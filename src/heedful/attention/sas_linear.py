"""SAS with linear keys and values, which fold away: many heads from a host's cache."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heedful.attention.config import AttentionConfig, inherit
from heedful.attention.folding import Folding
from heedful.attention.init import fill_, zero_sum
from heedful.attention.plain import is_plain
from heedful.attention.registry import register_attention
from heedful.attention.sas import Expansion, SASConfig, check_sim_heads, copied_heads
from heedful.ops.precision import wide_dtype
from heedful.ops.sas import average_heads


@dataclass(frozen=True)
class SASLinearConfig(AttentionConfig):
    """SAS whose keys and values are expanded linearly, so that the cache is the host's: 2·G·D values per token.

    A variant of ours of Zheng et al., arXiv 2507.07694. Queries are expanded as in SAS. A simulated key is a
    mixture of the host's key heads, a simulated value a convolution over heads and features, without relu and bias.
    More features (D̂ > D) of a linear key would add nothing: q̂ . (E k) = (E^T q̂) . k, a product of D features still.
    QK-norm acts on simulated queries and on the host's keys, before they are mixed and rotated; mixing heads
    commutes with the rotation, so that rotated keys are cached.
    """

    sim_heads: int | None = inherit(SASConfig, "sim_heads")
    kernel_size: int = inherit(SASConfig, "kernel_size")
    init: Literal["published", "identity"] = inherit(SASConfig, "init")
    expand_impl: Literal["auto", "reference", "blocked", "native"] = inherit(
        SASConfig, "expand_impl", help="how queries are expanded: auto, reference, blocked or native (C++)"
    )

    def check(self) -> None:
        """Ĥ is a multiple of H, W odd."""
        check_sim_heads(self)

    def reference(self) -> "SASLinearConfig":
        """A readable expansion and a readable score."""
        return dataclasses.replace(super().reference(), expand_impl="reference")

    @property
    def score_heads(self) -> int:
        """Ĥ."""
        assert self.sim_heads is not None
        return self.sim_heads

    @property
    def score_kv_heads(self) -> int:
        """1: each head of the host is in all simulated keys."""
        return 1

    def parameter_count(self) -> int:
        """q, k, v as for the host, the expansion of queries, the maps of keys and values, and the base class's."""
        rows, conv, linear, maps = self._products()
        biases = 2 * self.score_heads + 2 * self.size
        own = rows * (self.d_model + self.bias) + conv + linear + maps + biases
        return own + self.shared_parameter_count()

    def flops_per_token(self, context: int) -> int:
        """q, k, v as for the host, the expansion of queries, the maps of keys and values, and the base class's."""
        rows, conv, linear, maps = self._products()
        per_token = rows * self.d_model + self.size * (conv + maps) + self.score_heads * linear
        return 2 * per_token + self.shared_flops_per_token(context)

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """2·G·D values, and the score's state."""
        state = self.score_config.state_bytes_per_token(self.score_heads, bytes_per_value)
        return 2 * self.kv_heads * self.size * bytes_per_value + state

    def _products(self) -> tuple[int, int, int, int]:
        """Rows that read x; entries of the convolutions, of the linear layers, of the maps of keys and values."""
        heads, width = self.score_heads, self.kernel_size
        rows = (self.n_heads + 2 * self.kv_heads) * self.size
        conv = heads * (self.n_heads + heads) * width
        return rows, conv, 2 * self.size**2, heads * self.kv_heads * (1 + width)


@register_attention("sas_linear")
class SASLinearAttention(Folding):
    """SAS queries over linear mixtures of the host's keys and values; outputs are averaged as in SAS (PEAA).

    Training and prompts make all Ĥ keys and values. A single token after a cache reads the host's: its query stands
    once for each of the G key heads, times that head's share in the mixture, and the map of the values moves behind
    the weighted sum. Two starts: `init="published"` draws as PyTorch does, but for the mixture of keys, whose rows
    start with length 1, so that logits are of the size that was asked for; with `init="identity"` the module equals
    plain attention with the same projections.
    """

    Config = SASLinearConfig
    formula = """
        q as in SAS, D̂ = D:    q̂ = rope(norm(lin(conv(q))))           H -> Ĥ heads
        k̂^ĥ = sum_g a[ĥ,g] k^g      k^g = rope(norm(W_k^g x))          cached
        v̂^ĥ[d] = sum_g,w c[ĥ,g,w] v^g[d + w]      v^g = W_v^g x        cached
        out = W_o mean over the Ĥ/H groups of H heads of score(q̂, k̂) v̂
        one token:  q̂^ĥ . k̂^ĥ = [a[ĥ,1] q̂^ĥ; ...; a[ĥ,G] q̂^ĥ] . [k^1; ...; k^G]     c moves behind the sum
    """
    config: SASLinearConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        c = self.config
        heads, groups, wide, width = c.n_heads, c.kv_heads, c.score_heads, c.kernel_size
        self.q_proj = nn.Linear(c.d_model, heads * c.size, bias=c.bias)
        self.k_proj = nn.Linear(c.d_model, groups * c.size, bias=c.bias)
        self.v_proj = nn.Linear(c.d_model, groups * c.size, bias=c.bias)
        self.q_expand = Expansion(heads, wide, width, c.size, c.size, c.expand_impl)
        self.k_mix = nn.Linear(groups, wide, bias=False)
        self.v_mix = nn.Conv1d(groups, wide, width, padding=width // 2, bias=False)
        self.reset_parameters()

    def logit_projections(self) -> list[nn.Linear]:
        """Of queries and of keys, before their expansion."""
        return [self.q_proj, self.k_proj]

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Q (B, Ĥ, T, D); the host's keys, ready to be mixed, and values, heads side by side: (B, 1, T, G·D)."""
        c = self.config
        q = self.place_queries(self.q_expand(self.split_heads(self.q_proj(x), c.n_heads)), positions)
        k = self.place_keys(self.split_heads(self.k_proj(x), c.kv_heads), positions)
        return q, {"k": k.transpose(1, 2).flatten(2)[:, None], "v": self.v_proj(x)[:, None]}

    def keys_values(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The simulated keys and values."""
        k, v = (memory[name][:, 0].unflatten(-1, (self.config.kv_heads, -1)) for name in "kv")
        mixed = self.v_mix(v.flatten(0, 1)).unflatten(0, v.shape[:2])
        return self.k_mix(k.mT).permute(0, 3, 1, 2), mixed.transpose(1, 2)

    def folded_layers(self) -> list[nn.Module]:
        """The maps of the host's keys and values."""
        return [self.k_mix, self.v_mix]

    def fold_queries(self, q: Tensor) -> Tensor:
        """(B, Ĥ, 1, D) -> (B, Ĥ, 1, G·D)."""
        return (q[..., None, :] * self.k_mix.weight[:, None, :, None]).flatten(-2)

    def read_memory(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The host's keys and values, all heads as one."""
        return memory["k"], memory["v"]

    def unfold(self, out: Tensor) -> Tensor:
        """(B, Ĥ, 1, G·D) -> (B, Ĥ, 1, D)."""
        c = self.config
        each = out[:, :, 0].unflatten(-1, (c.kv_heads, -1)).flatten(1, 2)  # (B, Ĥ·G, D)
        mixed = F.conv1d(each, self.v_mix.weight, padding=c.kernel_size // 2, groups=c.score_heads)
        return mixed[:, :, None]

    def aggregate(self, out: Tensor) -> Tensor:
        """PEAA: (B, Ĥ, T, D) -> (B, T, C)."""
        return self.o_proj(average_heads(out, self.config.n_heads))

    def logit_sizes(self, q: Tensor, k: Tensor, real_q: Tensor, real_k: Tensor) -> Tensor:
        """As for all forms; the gains bound the host's keys, and a mixture is as large as its weights allow."""
        sizes = super().logit_sizes(q, k, real_q, real_k)
        if self.config.qk_norm and is_plain(self.k_norm, self.k_mix):
            largest = self.k_mix.weight.abs().sum(-1).max() * self.k_norm.weight.abs().max()
            bound = largest.to(wide_dtype(q)) * self.config.qk_dim**0.25
            sizes = torch.stack((sizes[:, 0], sizes[:, 1].maximum(bound)), dim=-1)
        return sizes

    def reset_parameters(self) -> None:
        """Fresh weights; `init` says how the expansion and the maps start."""
        super().reset_parameters()
        c = self.config
        taps = torch.zeros(self.v_mix.weight.shape)
        if c.init == "published":
            self.q_expand.reset_published()
            nn.init.uniform_(self.k_mix.weight, -((3 / c.kv_heads) ** 0.5), (3 / c.kv_heads) ** 0.5)
            bound = taps[0].numel() ** -0.5
            nn.init.uniform_(self.v_mix.weight, -bound, bound)
            return
        heads, groups = copied_heads(c)
        self.q_expand.reset_identity(heads, 1.0)
        taps[range(c.score_heads), groups, c.kernel_size // 2] = 1.0
        fill_(self.k_mix.weight, taps[..., c.kernel_size // 2])
        copies = c.score_heads // c.n_heads
        if copies > 1:  # equal copies would get equal gradients
            taps += zero_sum(copies, (c.n_heads, *taps.shape[1:])).flatten(0, 1)
        fill_(self.v_mix.weight, taps)

    def identity_parameters(self) -> list[Tensor]:
        """The taps that copy heads and features, when the module started from them."""
        if self.config.init == "published":
            return []
        c = self.config
        shapes: list[tuple[nn.Module, tuple[int, ...]]] = [
            (self.q_expand.conv1, (c.score_heads, c.n_heads, c.kernel_size)),
            (self.q_expand.lin1, (c.size, c.size)),
            (self.k_mix, (c.score_heads, c.kv_heads)),
            (self.v_mix, (c.score_heads, c.kv_heads, c.kernel_size)),
        ]
        return [p for layer, shape in shapes for p in layer.parameters() if tuple(p.shape) == shape]

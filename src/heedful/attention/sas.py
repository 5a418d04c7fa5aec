"""SAS, Simulated Attention Score: many wide heads from few narrow ones."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from heedful.attention.base import Attention
from heedful.attention.config import AttentionConfig, check_whole, option
from heedful.attention.init import fill_, zero_sum
from heedful.attention.plain import is_plain
from heedful.attention.registry import register_attention
from heedful.ops.causal import causal_attention
from heedful.ops.checks import check_divides, check_shape, check_tensor
from heedful.ops.precision import wide_dtype
from heedful.ops.rope import rotation
from heedful.ops.sas import NOWHERE, Features, Placement, average_heads, expand, place


@dataclass(frozen=True)
class SASConfig(AttentionConfig):
    """SAS: learned expansions simulate more and wider heads; their outputs are averaged (PEAA).

    Zheng et al., arXiv 2507.07694, NeurIPS 2025. Parameters grow by a few per cent of 4·C²; the
    attention itself costs Ĥ(D̂+D)/(2HD) times as much. Both caches are exact:
    "expanded" holds Ĥ(D̂+D) values per token and reads them as they are; "compact" holds 2GD values
    (the size of the host's own cache) and expands all S of them again at every step, which at 512
    cached tokens is some 200 times the other work of the layer for one new token.
    """

    sim_heads: int | None = option(None, "simulated heads Ĥ, a multiple of n_heads; 3 x n_heads if None")
    sim_head_dim: int | None = option(None, "simulated size D̂ of queries and keys; 1.5 x head_dim if None")
    kernel_size: int = option(3, "width W of the convolution over features, odd; 1 = MLP over heads")
    init: Literal["published", "identity"] = option(
        "published", "start: published (PyTorch's default) or identity (equals plain attention)"
    )
    cache: Literal["expanded", "compact"] = option(
        "expanded", "what is cached: expanded keys (fast) or compact ones (small, expanded when read)"
    )

    expand_impl: Literal["auto", "reference", "unfolded", "blocked", "native"] = option(
        "auto",
        "how the expansions are computed: auto, reference (readable, slow), unfolded (for GPUs), blocked or "
        "native (C++)",
    )

    rotated_dim_name: ClassVar[str] = "sim_head_dim"

    def check(self) -> None:
        """Ĥ is a multiple of H, D̂ at least D, W odd."""
        check_sim_heads(self)
        check_whole("sim_head_dim", self.sim_head_dim)
        if self.sim_head_dim is None:
            wide = -(-3 * self.size // 2)
            self._set("sim_head_dim", wide + wide % 2)
        if self.qk_dim < self.size and self.init == "identity":
            raise ValueError(
                f"sim_head_dim must be at least head_dim ({self.size}) to start as an identity, "
                f"got {self.qk_dim}; use {self.size} or more, or init='published'"
            )

    def reference(self) -> "SASConfig":
        """Readable expansions and a readable score."""
        return dataclasses.replace(super().reference(), expand_impl="reference")

    @property
    def score_heads(self) -> int:
        """Ĥ."""
        assert self.sim_heads is not None
        return self.sim_heads

    @property
    def score_kv_heads(self) -> int:
        """Ĥ; 1 for the compact cache, each head of which serves all of Ĥ."""
        return self.score_heads if self.cache == "expanded" else 1

    @property
    def qk_dim(self) -> int:
        """D̂."""
        assert self.sim_head_dim is not None
        return self.sim_head_dim

    def parameter_count(self) -> int:
        """q, k, v as for the host, three expansions, and what the base class holds."""
        rows = (self.n_heads + 2 * self.kv_heads) * self.size
        heads, width = self.score_heads, self.kernel_size
        conv = sum(
            heads * (h + heads) * width + 2 * heads for h in (self.n_heads, self.kv_heads, self.kv_heads)
        )
        linear = 2 * (self.qk_dim * (self.size + self.qk_dim) + 2 * self.qk_dim)
        projections = rows * (self.d_model + self.bias)
        return projections + conv + linear + self.shared_parameter_count()

    def flops_per_token(self, context: int) -> int:
        """q, k, v as for the host, three expansions, and what the base class does."""
        rows = (self.n_heads + 2 * self.kv_heads) * self.size
        heads, width = self.score_heads, self.kernel_size
        conv = sum(
            self.size * heads * (h + heads) * width for h in (self.n_heads, self.kv_heads, self.kv_heads)
        )
        linear = 2 * heads * self.qk_dim * (self.size + self.qk_dim)
        return 2 * (rows * self.d_model + conv + linear) + self.shared_flops_per_token(context)

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Ĥ(D̂+D) values expanded; 2GD values and an int64 position compact."""
        state = self.score_config.state_bytes_per_token(self.score_heads, bytes_per_value)
        if self.cache == "compact":
            return 2 * self.kv_heads * self.size * bytes_per_value + 8 + state
        return self.score_heads * (self.qk_dim + self.v_dim) * bytes_per_value + state


def check_sim_heads(config: Any) -> None:
    """Check and resolve `sim_heads` and `kernel_size`: Ĥ is a multiple of H, W odd."""
    if config.sim_heads is None:
        config._set("sim_heads", 3 * config.n_heads)
    for name in ("sim_heads", "kernel_size"):
        check_whole(name, getattr(config, name))
    width = config.kernel_size
    if width is None:
        raise ValueError("kernel_size must be a whole number >= 1, got None")
    check_divides("sim_heads", config.sim_heads, "n_heads", config.n_heads)
    if width % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd, so that it has a centre, got {width}; use {width - 1} or {width + 1}"
        )


def copied_heads(config: AttentionConfig) -> tuple[list[int], list[int]]:
    """Which query head, and which key head, each simulated head copies in an identity start."""
    heads = [h % config.n_heads for h in range(config.score_heads)]
    return heads, [h * config.kv_heads // config.n_heads for h in heads]


class Expansion(nn.Module):
    """The learned expansion of one of q, k, v: H -> Ĥ heads and, for q and k, D -> D̂ features.

    Args:
        n_heads: H, the heads that come in.
        sim_heads: Ĥ.
        kernel_size: W, odd.
        head_dim: D.
        sim_head_dim: D̂, or None to leave the features alone, as for v.
        impl: how it is computed, see `heedful.ops.sas.expand`.
    """

    def __init__(
        self,
        n_heads: int,
        sim_heads: int,
        kernel_size: int,
        head_dim: int,
        sim_head_dim: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.impl = impl
        self.conv1 = nn.Conv1d(n_heads, sim_heads, kernel_size, padding=kernel_size // 2)
        self.conv2 = nn.Conv1d(sim_heads, sim_heads, kernel_size, padding=kernel_size // 2)
        self.widens = sim_head_dim is not None
        if sim_head_dim is not None:
            self.lin1 = nn.Linear(head_dim, sim_head_dim)
            self.lin2 = nn.Linear(sim_head_dim, sim_head_dim)

    def forward(self, x: Tensor, placement: Placement = NOWHERE) -> Tensor:
        """(B, H, T, D) -> (B, Ĥ, T, D̂), normed and rotated as `placement` says, or (B, Ĥ, T, D) for v."""
        conv1, conv2, features = self.conv1, self.conv2, None
        one_operation = is_plain(*self.children())
        if self.widens and one_operation:
            features = Features(self.lin1.weight, self.lin1.bias, self.lin2.weight, self.lin2.bias)
        if one_operation or is_plain(conv1, conv2):
            convs = conv1.weight, conv1.bias, conv2.weight, conv2.bias
            where = NOWHERE if features is None else placement
            x = expand(x, *convs, features, where, impl=self.impl)
        else:
            x = self._call_convs(x)
        if one_operation or not self.widens:
            return x
        x = self.lin1(x)
        return place(x + self.lin2(x.relu()), placement)

    def _call_convs(self, x: Tensor) -> Tensor:
        """The first step, (B, H, T, D) -> (B, Ĥ, T, D), for layers that must be called."""
        batch, _, length, _ = x.shape
        x = self.conv1(x.transpose(1, 2).flatten(0, 1))
        x = x + self.conv2(x.relu())
        return x.unflatten(0, (batch, length)).transpose(1, 2)

    def reset_published(self) -> None:
        """PyTorch's own start of every layer: uniform within ±1/sqrt(fan in)."""
        for layer in self.children():
            assert isinstance(layer, nn.Conv1d | nn.Linear)
            bound = layer.weight[0].numel() ** -0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            assert layer.bias is not None
            nn.init.uniform_(layer.bias, -bound, bound)

    def reset_identity(self, source: list[int], gain: float, copies: int = 1) -> None:
        """Simulated head h copies head `source[h]`, features keep their places, times `gain`.

        With `copies` > 1, for values, the copies of a head start apart, by amounts whose sum is zero.
        With D̂ > D, feature i of each half of D goes to the start of that half of D̂, where the rotary
        pairs of D are.
        """
        nn.init.zeros_(self.conv1.bias)  # type: ignore[arg-type]
        taps = torch.zeros(self.conv1.weight.shape)
        taps[range(len(source)), source, self.conv1.weight.shape[-1] // 2] = 1.0
        if copies > 1:
            taps += zero_sum(copies, (len(source) // copies, *taps.shape[1:])).flatten(0, 1)
        fill_(self.conv1.weight, taps)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        if not self.widens:
            return
        wide, narrow = self.lin1.weight.shape
        places = torch.zeros(wide, narrow)
        half = narrow // 2  # an odd D has no pairs; any place of its own will do
        for i in range(narrow):
            places[i if i < half else wide // 2 + i - half, i] = gain
        fill_(self.lin1.weight, places)
        nn.init.zeros_(self.lin1.bias)
        nn.init.zeros_(self.lin2.weight)
        nn.init.zeros_(self.lin2.bias)


@register_attention("sas")
class SASAttention(Attention):
    """SAS with projections, expansions, QK-norm and rotary positions after them, any score, PEAA.

    `SASAttention(d_model, n_heads, sim_heads, sim_head_dim, kernel_size, ...)`; the fields of
    `SASConfig` are its arguments. On a GQA host (n_kv_heads < n_heads) k and v are projected with G heads
    and expanded from there to Ĥ. Two starts: `init="published"`, PyTorch's defaults as in the paper's
    code, and `init="identity"`, where the module equals plain attention with the same projections.
    """

    Config = SASConfig
    formula = """
        q, k, v per token:    x1 = conv1(x)              H -> Ĥ heads, W features wide
                              x2 = x1 + conv2(relu(x1))
        q, k, heads alike:    x3 = lin1(x2)              D -> D̂ features
                              x4 = x3 + lin2(relu(x3))
        out = W_o mean over the Ĥ/H groups of H heads of score(q̂, k̂) v̂
    """
    config: SASConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        heads, groups, size = config.n_heads, config.kv_heads, config.size
        self.q_proj = nn.Linear(config.d_model, heads * size, bias=config.bias)
        self.k_proj = nn.Linear(config.d_model, groups * size, bias=config.bias)
        self.v_proj = nn.Linear(config.d_model, groups * size, bias=config.bias)
        wide, width = config.score_heads, config.kernel_size
        impl = config.expand_impl
        self.q_expand = Expansion(heads, wide, width, size, config.qk_dim, impl)
        self.k_expand = Expansion(groups, wide, width, size, config.qk_dim, impl)
        self.v_expand = Expansion(groups, wide, width, size, impl=impl)
        if config.qk_norm:
            # Zeros widen D to D̂ in the identity start: with epsilon scaled alike, the norm is the same.
            for norm in (self.q_norm, self.k_norm):
                norm.eps = config.norm_eps * size / config.qk_dim
        self.reset_parameters()

    def logit_projections(self) -> list[nn.Linear]:
        """Of queries and of keys, before their expansion."""
        return [self.q_proj, self.k_proj]

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Q (B, Ĥ, T, D̂); k (B, Ĥ, T, D̂) and v (B, Ĥ, T, D), or both unexpanded with their positions."""
        config = self.config
        q = self._widen(
            self.q_expand, self.split_heads(self.q_proj(x), config.n_heads), positions, self._norm("q_norm")
        )
        k = self.split_heads(self.k_proj(x), config.kv_heads)
        v = self.split_heads(self.v_proj(x), config.kv_heads)
        if config.cache == "compact":
            return q, {"k": k, "v": v, "positions": positions.expand(x.shape[0], -1)}
        return q, {"k": self._widen(self.k_expand, k, positions, self._norm("k_norm")), "v": self.v_expand(v)}

    def keys_values(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The expanded keys and values; the compact cache expands them here."""
        if self.config.cache == "expanded":
            return memory["k"], memory["v"]
        k = self._widen(self.k_expand, memory["k"], memory["positions"], self._norm("k_norm"))
        return k, self.v_expand(memory["v"])

    def _norm(self, name: str) -> nn.RMSNorm | None:
        return getattr(self, name) if self.config.qk_norm else None

    def _widen(self, expansion: Expansion, x: Tensor, positions: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """Expand queries or keys, then norm and rotate them, in one operation where the norm may be read."""
        config, cos, sin = self.config, None, None
        if norm is not None and not is_plain(norm):
            return self._place(expansion(x), positions, norm)
        if config.rope:
            cos, sin = rotation(
                positions, config.qk_dim, wide_dtype(x), theta=config.rope_theta, base_dim=config.size
            )
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps or 0.0)
        return expansion(x, Placement(weight, eps, cos, sin, config.qk_norm_position == "before_rope"))

    def aggregate(self, out: Tensor) -> Tensor:
        """PEAA: (B, Ĥ, T, D) -> (B, T, C)."""
        return self.o_proj(average_heads(out, self.config.n_heads))

    def reset_parameters(self) -> None:
        """Fresh weights; `init` says how the expansions start."""
        super().reset_parameters()
        config = self.config
        if config.init == "published":
            for expansion in (self.q_expand, self.k_expand, self.v_expand):
                expansion.reset_published()
            return
        heads, groups = copied_heads(config)
        # The scale 1/sqrt(D̂) is smaller than 1/sqrt(D): make up for it in q and k, or in their norms.
        gain = (config.qk_dim / config.size) ** 0.25
        self.q_expand.reset_identity(heads, 1.0 if config.qk_norm else gain)
        self.k_expand.reset_identity(groups, 1.0 if config.qk_norm else gain)
        self.v_expand.reset_identity(groups, 1.0, config.score_heads // config.n_heads)
        if config.qk_norm:
            for norm in (self.q_norm, self.k_norm):
                nn.init.constant_(norm.weight, config.init_logit_std**0.5 / gain)

    def identity_parameters(self) -> list[Tensor]:
        """The taps that copy heads and features, when the module started from them."""
        if self.config.init == "published":
            return []
        c = self.config
        lin = (c.qk_dim, c.size)
        holders: list[tuple[nn.Module, tuple[int, ...]]]
        holders = [(e.lin1, lin) for e in (self.q_expand, self.k_expand)]
        for expansion, heads in (
            (self.q_expand, c.n_heads),
            (self.k_expand, c.kv_heads),
            (self.v_expand, c.kv_heads),
        ):
            holders.append((expansion.conv1, (c.score_heads, heads, c.kernel_size)))
        # By shape: pruned and parametrized layers keep them under names of their own.
        return [p for layer, shape in holders for p in layer.parameters() if tuple(p.shape) == shape]


class SASCore(nn.Module):
    """The published SAS module: q, k, v in, the attention output out, causal.

    No projections of the input, no normalisation, no positions: exactly the function of the paper's
    code, for checkpoints of it and for models that bring their own projections.

    Args:
        n_heads: H.
        sim_heads: Ĥ, a multiple of H.
        head_dim: D.
        sim_head_dim: D̂.
        kernel_size: W, odd.

    Raises:
        ValueError: if the sizes do not fit.
    """

    def __init__(
        self, n_heads: int, sim_heads: int, head_dim: int, sim_head_dim: int, kernel_size: int = 3
    ) -> None:
        super().__init__()
        config = SASConfig(
            n_heads * head_dim,
            n_heads,
            sim_heads,
            sim_head_dim,
            kernel_size,
            rope=False,
            qk_norm=False,
        )
        self.config = config
        self.q_expand = Expansion(n_heads, sim_heads, kernel_size, head_dim, sim_head_dim)
        self.k_expand = Expansion(n_heads, sim_heads, kernel_size, head_dim, sim_head_dim)
        self.v_expand = Expansion(n_heads, sim_heads, kernel_size, head_dim)
        self.o_proj = nn.Linear(n_heads * head_dim, n_heads * head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend causally.

        Args:
            q: (B, T, H, D).
            k: (B, T, H, D).
            v: (B, T, H, D).

        Returns:
            (B, T, H * D).
        """
        batch, length = check_tensor("q", q, "(B, T, H, D)").shape[:2]
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_tensor(name, x, "(B, T, H, D)")
            expected = (batch, length, self.config.n_heads, self.config.size)
            check_shape(name, x, expected, "(B, T, H, D)")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scale = self.config.qk_dim**-0.5
        out = causal_attention(self.q_expand(q), self.k_expand(k), self.v_expand(v), scale)
        return self.o_proj(average_heads(out, self.config.n_heads))

    def load_published_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load the weights of the published module.

        Args:
            state_dict: keys `sas_q.0.weight`, `sas_q.1.process.weight`, `sas_q.2.weight`,
                `sas_q.3.process.weight` and their biases, the same for `sas_k`; `sas_v.0`,
                `sas_v.1.process`; `output_dense`.

        Raises:
            ValueError: if keys are missing or unknown, or a shape does not fit; nothing is loaded then.
        """
        names = {"output_dense": "o_proj"}
        for part in "qkv":
            names[f"sas_{part}.0"] = f"{part}_expand.conv1"
            names[f"sas_{part}.1.process"] = f"{part}_expand.conv2"
            if part != "v":
                names[f"sas_{part}.2"] = f"{part}_expand.lin1"
                names[f"sas_{part}.3.process"] = f"{part}_expand.lin2"
        own = self.state_dict()
        keys = {
            f"{theirs}.{kind}": f"{ours}.{kind}"
            for theirs, ours in names.items()
            for kind in ("weight", "bias")
        }
        missing, unknown = sorted(keys.keys() - state_dict), sorted(state_dict.keys() - keys)
        if missing or unknown:
            raise ValueError(
                f"this is no state dict of the published SAS module: missing {missing or 'nothing'}, "
                f"unknown {unknown or 'nothing'}"
            )
        for theirs, ours in keys.items():
            if state_dict[theirs].shape != own[ours].shape:
                raise ValueError(
                    f"{theirs} must have shape {tuple(own[ours].shape)} for {self._sizes()}, "
                    f"got {tuple(state_dict[theirs].shape)}"
                )
        self.load_state_dict({ours: state_dict[theirs] for theirs, ours in keys.items()})

    def _sizes(self) -> str:
        c = self.config
        return f"H={c.n_heads}, Ĥ={c.score_heads}, D={c.size}, D̂={c.qk_dim}, W={c.kernel_size}"

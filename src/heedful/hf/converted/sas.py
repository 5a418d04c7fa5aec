"""SAS in a converted model: more simulated heads from the source's own q, k and v, which start as copies of them.

The source hands over queries and keys that are normed and rotated. An expansion of rotated features would depend on
more than how far two tokens are apart, so the rotation is taken back, and what the expansion changes is rotated
again and added to the copies. At the start that is nothing: simulated queries and keys are the source's to the bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heedful.attention.init import fill_, zero_sum
from heedful.attention.sas import SASConfig
from heedful.ops.precision import wide_dtype
from heedful.ops.rope import rotate
from heedful.ops.sas import Features, average_heads, expand

OPTIONS = "sim_heads", "sim_head_dim", "kernel_size"
"""What of `SASConfig` a conversion can choose."""

Rotation = tuple[Tensor, Tensor] | None
"""Cosine and sine as transformers hands them to a layer, (1 or B, T, R) each, every angle twice: the first R
features are rotated in pairs (i, i + R/2). None: the model has no rotation."""


@dataclass(frozen=True)
class Sizes:
    """What is expanded to what.

    Raises:
        ValueError: if the sizes do not fit.
    """

    heads: int
    """H."""
    kv_heads: int
    """G."""
    head_dim: int
    """D."""
    copies: int
    """Simulated heads for each head: Ĥ/H, for keys and values too, so that query heads keep their groups."""
    sim_head_dim: int | None
    """D̂ of queries and keys; None leaves the features alone."""
    kernel_size: int
    """W."""

    @classmethod
    def of(cls, options: Mapping[str, Any], config: Any) -> "Sizes":
        """From the options of a conversion and the config of a source, an object or what its config.json says."""
        heads = _field(config, "num_attention_heads", "n_head")
        kv_heads = _field(config, "num_key_value_heads") or heads
        width = _field(config, "hidden_size", "n_embd")
        if not all(isinstance(size, int) and size > 0 for size in (heads, kv_heads, width)):
            raise ValueError(
                f"the config is unsound: {heads!r} heads, {kv_heads!r} key heads, width {width!r}"
            )
        size = _field(config, "head_dim") or width // heads
        own = {"sim_heads": None, "kernel_size": 3, **options}
        wide = own.pop("sim_head_dim", None)
        if isinstance(wide, int) and wide < size:
            raise ValueError(f"sim_head_dim must be at least the head_dim of the source ({size}), got {wide}")
        # its checks are ours
        checked = SASConfig(
            width,
            heads,
            sim_head_dim=size if wide is None else wide,
            head_dim=size,
            rope=False,
            init="identity",
            **own,
        )
        return cls(heads, kv_heads, size, checked.score_heads // heads, wide, checked.kernel_size)

    @property
    def sim_heads(self) -> int:
        """Ĥ."""
        return self.copies * self.heads

    @property
    def sim_kv_heads(self) -> int:
        """Simulated key and value heads: what a cache holds."""
        return self.copies * self.kv_heads

    @property
    def of_cache(self) -> float:
        """How many times the source's keys and values a token takes."""
        return self.copies * ((self.sim_head_dim or self.head_dim) + self.head_dim) / (2 * self.head_dim)


def _field(config: Any, *names: str) -> Any:
    """The first of some fields that a config has."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return None


class Expansion(nn.Module):
    """The expansion of one of q, k, v, as in `heedful.ops.sas.expand`; its parameters are what differs from copies.

    Simulated head i copies head i mod H. All parameters but two start at zero, so that weight decay, too, draws
    towards the source: the values of copies start apart (`heedful.attention.init.zero_sum`), and where features are
    added to queries and keys, those of the queries start random.

    Args:
        heads: H, the heads that come in.
        sizes: of the model.
        part: "q", "k" or "v".
    """

    def __init__(self, heads: int, sizes: Sizes, part: str) -> None:
        super().__init__()
        self.heads, self.sizes, self.part = heads, sizes, part
        wide, size, sim_size = sizes.copies * heads, sizes.head_dim, sizes.sim_head_dim
        self.conv1 = nn.Parameter(torch.empty(wide, heads, sizes.kernel_size))
        self.conv1_bias = nn.Parameter(torch.empty(wide))
        self.conv2 = nn.Parameter(torch.empty(wide, wide, sizes.kernel_size))
        self.conv2_bias = nn.Parameter(torch.empty(wide))
        self.widens = part != "v" and sim_size is not None
        if part != "v" and sim_size is not None:
            self.lin1 = nn.Parameter(torch.empty(sim_size, size))
            self.lin1_bias = nn.Parameter(torch.empty(sim_size))
            self.lin2 = nn.Parameter(torch.empty(sim_size, sim_size))
            self.lin2_bias = nn.Parameter(torch.empty(sim_size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, T, D), not rotated -> (B, Ĥ, T, D̂), or (B, Ĥ, T, D) where features are left alone."""
        like: Any = {"dtype": self.conv1.dtype, "device": self.conv1.device}
        same = torch.eye(self.heads, **like).repeat(self.sizes.copies, 1)[..., None]
        conv1 = self.conv1 + F.pad(same, (self.sizes.kernel_size // 2,) * 2)
        features = None
        if self.widens:
            lin1 = self.lin1 + torch.eye(*self.lin1.shape, **like)
            features = Features(lin1, self.lin1_bias, self.lin2, self.lin2_bias)
        return expand(x, conv1, self.conv1_bias, self.conv2, self.conv2_bias, features)

    def reset_parameters(self) -> None:
        """As at the start."""
        for parameter in self.parameters():
            fill_(parameter, torch.zeros(parameter.shape))
        if self.part == "v":
            apart = zero_sum(self.sizes.copies, (self.heads, *self.conv1.shape[1:]))
            fill_(self.conv1, apart.flatten(0, 1))
        elif self.part == "q" and self.widens:
            added = torch.randn(self.lin1.shape) * self.sizes.head_dim**-0.5
            added[: self.sizes.head_dim] = 0.0
            fill_(self.lin1, added)


class SimulatedHeads(nn.Module):
    """What stands between the source's q, k, v and the score, and between the score and the output projection."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.q = Expansion(sizes.heads, sizes, "q")
        self.k = Expansion(sizes.kv_heads, sizes, "k")
        self.v = Expansion(sizes.kv_heads, sizes, "v")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """From q (B, H, T, D), k, v (B, G, T, D) to (B, Ĥ, T, D̂), (B, mG, T, D̂), (B, mG, T, D), m = Ĥ/H."""
        return self._placed(self.q, q, rotation), self._placed(self.k, k, rotation), self.v(v)

    def average(self, out: Tensor) -> Tensor:
        """(B, Ĥ, T, E) -> (B, T, H, E): one output projection for the mean of the simulated heads (PEAA)."""
        return average_heads(out, self.sizes.heads).unflatten(-1, (self.sizes.heads, -1))

    def reset_parameters(self) -> None:
        """As at the start: the source."""
        for part in (self.q, self.k, self.v):
            part.reset_parameters()

    def _placed(self, expansion: Expansion, x: Tensor, rotation: Rotation) -> Tensor:
        copies, size = self.sizes.copies, self.sizes.head_dim
        plain = x if rotation is None else turn(x, rotation, back=True)
        wide = expansion(plain)
        change = wide[..., :size] - plain.repeat(1, copies, 1, 1)
        change = change if rotation is None else turn(change, rotation)
        out = x.repeat(1, copies, 1, 1) + change
        # added features are not rotated: the source's frequencies end with its own
        return torch.cat((out, wide[..., size:]), dim=-1).to(x.dtype)


def turn(x: Tensor, rotation: tuple[Tensor, Tensor], *, back: bool = False) -> Tensor:
    """Rotate the first features of x (B, H, T, D), with what the rotation stretches; or take that back."""
    n = rotation[0].shape[-1]
    cos, sin = (part[:, None, :, : n // 2].to(wide_dtype(x)) for part in rotation)
    if back:
        size = cos * cos + sin * sin
        cos, sin = cos / size, -sin / size
    return torch.cat((rotate(x[..., :n], cos, sin), x[..., n:]), dim=-1)

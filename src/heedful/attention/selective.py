"""Selective attention as a Score: head 0 votes, the votes are subtracted from every head's logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heedful.attention.config import ScoreConfig, check_whole, option
from heedful.attention.init import fill_
from heedful.attention.registry import register_score
from heedful.attention.score import EvictableScore, LayerLoss, Select, Selection
from heedful.attention.softmax import SoftmaxScore
from heedful.ops.checks import check_choice
from heedful.ops.dot_product import wide_logits
from heedful.ops.precision import wide_dtype
from heedful.ops.selective import memory_share, selective_attention, unmasked_count
from heedful.ops.selective.api import attend_visible
from heedful.ops.selective.pruned import attend_pruned
from heedful.ops.selective.reference import soft_masks
from heedful.ops.selective.slots import attend_slots

OWN_VOTES, VOTES = 8.0, -6.0
"""Where a retention starts, before its softplus: 8 votes, so that it may say less, and 0.0025 more per query."""

STEPS = 2.0**19
"""A retention counts in parts of 1 / STEPS, unless it learns: F up to 32 is then an exact sum in float32, in
whatever order, in one pass or token by token."""


@register_score("selective")
class SelectiveScore(EvictableScore):
    """softmax(L - F) with F[i,j] = sum_{u<i} relu(L^0[u,j]): tokens vote earlier tokens away.

    L^0 are the logits of attention head 0, as in the paper, or of selection heads of its own (`selector="added"`),
    two projections of the layer's input: `select_q` and `select_k`. With as many of those as key heads, each key
    head and its query heads have an F, and under a budget tokens, of their own.

    `selector="retention"` asks the token alone, as it arrives, what its votes begin with and how many every later
    query will cast: a small network of the layer's input says both, and F[i,j] = c_j + a_j (i - j - 1). Compare the
    retention gates of TRIM-KV (arXiv 2512.03324).
    """

    bilinear = True
    formula = """
        S[i,j]   = relu(q^0_i . k^0_j / sqrt(D)),  0 for the first token and for j = i
        F[i,j]   = sum_{u<i} S[u,j]
        out^h[i] = sum_{j<=i} softmax_j(q^h_i . k^h_j / sqrt(D) - F[i,j]) v^h_j
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        """Selective attention: one head's positive logits mask earlier tokens for all heads. No parameters.

        Leviathan, Kalman, Matias, arXiv 2410.02703, ICLR 2025. The cache holds one more fp32 number per
        token, the votes against it; the logits of the selection head are those of attention head 0. Not in the
        paper: selection heads of its own, for models that were trained without, and votes that only say who goes.
        """

        implementations = ("auto", "reference", "sdpa", "blocked", "native", "triton")

        impl: str = option(
            "auto",
            "how it is computed: auto, reference (readable, slow), sdpa, blocked (memory grows with T), native "
            "(blocked in C++), or triton (NVIDIA GPUs); the last three raise under a budget",
        )
        memory_loss: float = option(
            0.0, "weight of the memory loss, which trains for small caches; paper: 0.1"
        )
        memory_tau: float = option(1.0, "votes at which a token counts as gone in the memory loss")
        selector: Literal["head", "added", "retention"] = option(
            "head",
            "who votes: attention head 0 (head, as in the paper), selection heads of its own (added), or all "
            "queries alike, as much as the token itself said when it came (retention)",
        )
        selectors: int = option(1, "added selectors: one for the layer, or one for each key/value head")
        select_dim: int = option(
            32, "size of an added selection head; a retention has twice as many hidden features"
        )
        subtract: bool = option(True, "subtract the votes from the logits; else they only say who is evicted")

        def __post_init__(self) -> None:
            super().__post_init__()
            check_whole("selectors", self.selectors)
            check_whole("select_dim", self.select_dim)
            check_choice("selector", self.selector, ("head", "added", "retention"))
            if self.selector == "head" and self.selectors != 1:
                raise ValueError(
                    f"selectors={self.selectors} needs selector='added' or 'retention'; attention head 0 is one "
                    f"selection head"
                )
            if self.selector == "retention" and self.subtract:
                raise ValueError(
                    "selector='retention' says who goes, and is not subtracted: give subtract=False"
                )
            if not self.subtract and self.memory_loss:
                raise ValueError("memory_loss trains votes that are subtracted; it needs subtract=True")
            for name, least in (("memory_loss", 0.0), ("memory_tau", None)):
                value = getattr(self, name)
                sound = isinstance(value, int | float) and not isinstance(value, bool) and value < math.inf
                if not sound or not (value > 0 if least is None else value >= least):
                    bound = "greater than 0" if least is None else "0 or more"
                    raise ValueError(f"{name} must be a finite number, {bound}, got {value!r}")

        def state_bytes_per_token(self, n_heads: int, bytes_per_value: int = 4) -> int:
            """One float32 per token and selection head, F, and the keys of added ones."""
            size = {"head": 0, "added": self.select_dim, "retention": 1}[self.selector]
            keys = size * bytes_per_value
            return self.selectors * ((4 if self.subtract else 0) + keys)

        def parameter_count(self, n_heads: int, d_model: int) -> int:
            """None, or those of added selection heads or of the retention."""
            if self.selector == "retention":
                hidden = 2 * self.select_dim
                return hidden * (d_model + 1) + 2 * self.selectors * (hidden + 1)
            return 2 * self.selectors * self.select_dim * (d_model + 1) if self.selector == "added" else 0

        def flops_per_token(self, context: int, n_heads: int, qk_dim: int, v_dim: int, d_model: int) -> int:
            """Those of softmax, and of added selection heads."""
            flops = super().flops_per_token(context, n_heads, qk_dim, v_dim, d_model)
            if self.selector == "added":
                flops += 2 * self.selectors * self.select_dim * (context + 2 * d_model)
            if self.selector == "retention":
                flops += 4 * self.select_dim * (d_model + 2 * self.selectors)
            return flops

    config: Config

    @property
    def subtracts(self) -> bool:
        """Whether votes are subtracted, or only say who goes."""
        return self.config.subtract

    def __init__(self, config: ScoreConfig, n_heads: int, d_model: int) -> None:
        super().__init__(config, n_heads, d_model)
        if self.config.selector == "added":
            self.selectors = self.config.selectors
            wide = self.selectors * self.config.select_dim
            self.select_q = nn.Linear(d_model, wide)
            self.select_k = nn.Linear(d_model, wide)
        if self.config.selector == "retention":
            self.selectors = self.config.selectors
            hidden = 2 * self.config.select_dim
            self.retain = nn.Sequential(
                nn.Linear(d_model, hidden), nn.SiLU(), nn.Linear(hidden, 2 * self.selectors)
            )

    def selection(self, x: Tensor, scale: float) -> Selection | None:
        """Queries and keys of the added selection heads, (B, R, T, D') both; logits are over sqrt(D').

        Of a retention queries that are all alike, and as a key the votes that each will cast, D' = 1.
        """
        if self.config.selector == "head":
            return None
        if self.config.selector == "retention":
            said = nn.functional.softplus(self.retain(x).to(wide_dtype(x)))
            if not torch.is_grad_enabled():  # in place: in a decoding step every operation counts
                said = said.mul_(STEPS).round_().div_(STEPS)
            own_votes, votes = said.mT.chunk(2, dim=1)
            k = votes[..., None].to(x.dtype)
            return Selection(k.new_tensor(1 / scale).expand(k.shape), k, own_votes)
        shape = (self.selectors, self.config.select_dim)
        q, k = (layer(x).unflatten(-1, shape).transpose(1, 2) for layer in (self.select_q, self.select_k))
        return Selection(q * (self.config.select_dim**-0.5 / scale), k)

    def reset_parameters(self) -> None:
        """Added selection heads start with logits as small as all logits do; a retention silent."""
        if self.config.selector == "retention":
            first: Any = self.retain[0]
            nn.init.normal_(first.weight, std=first.in_features**-0.5)
            nn.init.zeros_(first.bias)
            self.silence()
        if self.config.selector == "added":
            for layer in (self.select_q, self.select_k):
                nn.init.normal_(layer.weight, std=(0.2 / layer.in_features) ** 0.5)
                nn.init.zeros_(layer.bias)

    def silence(self) -> None:
        """Let added selection heads cast no vote at all: their keys become zero. A retention treats all alike."""
        if self.config.selector == "head":
            return
        if self.config.selector == "retention":
            last: Any = self.retain[2]
            fill_(last.weight, torch.zeros(last.weight.shape))
            fill_(last.bias, torch.tensor([OWN_VOTES, VOTES]).repeat_interleave(self.selectors))
            return
        fill_(self.select_k.weight, torch.zeros(self.select_k.weight.shape))
        fill_(self.select_k.bias, torch.zeros(self.select_k.bias.shape))

    @property
    def silent(self) -> bool:
        """Whether added selection heads have keys, or queries, of zero, or a retention treats all tokens alike."""
        if self.config.selector == "head":
            return False
        if self.config.selector == "retention":
            last: Any = self.retain[2]
            return not bool(last.weight.any())
        return any(
            not bool(layer.weight.any()) and not bool(layer.bias.any())
            for layer in (self.select_q, self.select_k)
        )

    @property
    def causal_to_the_bit(self) -> bool:
        """The formula is; its kernels decide per block of queries whether a maximum is needed."""
        return self.config.impl == "reference"

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
        select: Select = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`softmax(L - F) v`, with the votes on earlier keys in `state["soft_mask"]`, (B, R, S - T)."""
        masks: dict[str, Any] = {"key_mask": key_mask, "segment_ids": segment_ids}
        if not self.config.subtract:  # nobody asks for votes while every token stays
            return self._softmax(q, k, v, x=x, state={}, scale=scale, **masks)
        select_q, select_k = select or (None, None)
        out, soft_mask = selective_attention(
            q,
            k,
            v,
            select_q=select_q,
            select_k=select_k,
            soft_mask=state.get("soft_mask"),
            scale=scale,
            padding_is_finite=True,  # the layer sees to it
            impl=self.config.impl,
            **masks,
        )
        return out, {"soft_mask": soft_mask}

    def layer_loss(
        self,
        q: Tensor,
        k: Tensor,
        *,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        scale: float,
        select: Select = None,
    ) -> LayerLoss | None:
        """The memory loss: the largest share of a row that is held, times `memory_loss`; the mean of key heads."""
        if not self.config.memory_loss:
            return None
        masks: dict[str, Any] = {"key_mask": key_mask, "segment_ids": segment_ids}
        select_q, select_k = select or (q[:, :1], k[:, :1])
        counts = unmasked_count(select_q, select_k, tau=self.config.memory_tau, scale=scale, **masks)
        share = memory_share(counts, **masks).mean(1)
        return LayerLoss(self.config.memory_loss * share, counts.mean(1).detach())

    state_names = ["soft_mask"]

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
        select: Select = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`softmax(L - F) v` over the visible keys."""
        if not self.config.subtract:
            out, _ = self._softmax.attend(q, k, v, x=x, state={}, visible=visible, voted=voted, scale=scale)
            votes = soft_masks(self._select_logits(q, k, select, scale), state.get("soft_mask"), voted)
            return out, {"soft_mask": votes[:, :, -1].clone()}
        out, soft_mask = attend_visible(
            q, k, v, state.get("soft_mask"), visible, voted, scale, impl=self.config.impl, select=select
        )
        return out, {"soft_mask": soft_mask}

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
    ) -> tuple[Tensor, Tensor | None]:
        """`softmax(L - F) v` over slots, the votes in place, and who has most of them."""
        if self.config.impl != "auto":
            return super().attend_slots(
                q, k, v, x=x, state=state, positions=positions, newest=newest, scale=scale, select=select
            )
        votes, subtract = state["soft_mask"][:, 0], self.config.subtract
        return attend_slots(
            *(q, k, v, votes, positions, newest, scale),
            grace=grace,
            first=first,
            select=select,
            subtract=subtract,
        )

    def attend_pruned(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        positions: Tensor,
        scale: float,
        evict: Callable[[Tensor | None], Tensor | None],
        select: Select = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`softmax(L - F) v` over what is left; F is computed once, for the evictions and the attention."""
        if self.config.impl != "auto" or q.shape[2] == 1 or not self.config.subtract:
            return super().attend_pruned(
                q, k, v, x=x, state=state, positions=positions, scale=scale, evict=evict, select=select
            )
        out, soft_mask = attend_pruned(q, k, v, state.get("soft_mask"), positions, scale, evict, select)
        return out, {"soft_mask": soft_mask}

    def running_state(
        self,
        q: Tensor,
        k: Tensor,
        state: dict[str, Tensor],
        voted: Tensor,
        scale: float,
        select: Select = None,
    ) -> Tensor:
        """F before every query, (B, T, S): it depends on the votes only, not on what is evicted."""
        return soft_masks(self._select_logits(q, k, select, scale), state.get("soft_mask"), voted)[:, 0, :-1]

    @property
    def _softmax(self) -> SoftmaxScore:
        """Attention from which nothing is subtracted."""
        impl = "reference" if self.config.impl == "reference" else "auto"
        return SoftmaxScore(SoftmaxScore.Config(impl=impl), self.n_heads, self.d_model)

    @staticmethod
    def _select_logits(q: Tensor, k: Tensor, select: Select, scale: float) -> Tensor:
        select_q, select_k = select or (q[:, :1], k[:, :1])
        dtype = wide_dtype(q)
        return select_q.to(dtype) @ select_k.to(dtype).transpose(-1, -2) * scale

    def logits(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        voted: Tensor,
        scale: float,
        select: Select = None,
    ) -> Tensor:
        """L - F, (B, H, T, S)."""
        logits = wide_logits(q, k, scale)
        if not self.config.subtract:
            return logits
        return logits - self.running_state(q, k, state, voted, scale, select)[:, None]

"""Selective attention as a Score: head 0 votes, the votes are subtracted from every head's logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from heedful.attention.config import ScoreConfig, option
from heedful.attention.registry import register_score
from heedful.attention.score import EvictableScore, LayerLoss
from heedful.ops.dot_product import masked_softmax, repeat_kv
from heedful.ops.precision import wide_dtype
from heedful.ops.selective import memory_share, selective_attention, unmasked_count
from heedful.ops.selective.api import attend_visible
from heedful.ops.selective.pruned import attend_pruned
from heedful.ops.selective.reference import soft_masks
from heedful.ops.selective.slots import attend_slots


@register_score("selective")
class SelectiveScore(EvictableScore):
    """softmax(L - F) with F[i,j] = sum_{u<i} relu(L^0[u,j]): tokens vote earlier tokens away."""

    formula = """
        S[i,j]   = relu(q^0_i . k^0_j / sqrt(D)),  0 for the first token and for j = i
        F[i,j]   = sum_{u<i} S[u,j]
        out^h[i] = sum_{j<=i} softmax_j(q^h_i . k^h_j / sqrt(D) - F[i,j]) v^h_j
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        """Selective attention: one head's positive logits mask earlier tokens for all heads. No parameters.

        Leviathan, Kalman, Matias, arXiv 2410.02703, ICLR 2025. The cache holds one more fp32 number per
        token, the votes against it; the logits of the selection head are those of attention head 0.
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

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, least in (("memory_loss", 0.0), ("memory_tau", None)):
                value = getattr(self, name)
                sound = isinstance(value, int | float) and not isinstance(value, bool) and value < math.inf
                if not sound or not (value > 0 if least is None else value >= least):
                    bound = "greater than 0" if least is None else "0 or more"
                    raise ValueError(f"{name} must be a finite number, {bound}, got {value!r}")

        def state_bytes_per_token(self) -> int:
            """One float32 per token: F."""
            return 4

    config: Config

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`softmax(L - F) v`, with the votes on earlier keys in `state["soft_mask"]`, (B, 1, S - T)."""
        out, soft_mask = selective_attention(
            q,
            k,
            v,
            soft_mask=state.get("soft_mask"),
            key_mask=key_mask,
            segment_ids=segment_ids,
            scale=scale,
            impl=self.config.impl,
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
    ) -> LayerLoss | None:
        """The memory loss: the largest share of a row that is held, times `memory_loss`."""
        if not self.config.memory_loss:
            return None
        masks: dict[str, Any] = {"key_mask": key_mask, "segment_ids": segment_ids}
        counts = unmasked_count(q[:, :1], k[:, :1], tau=self.config.memory_tau, scale=scale, **masks)
        share = memory_share(counts, **masks)[:, 0]
        return LayerLoss(self.config.memory_loss * share, counts[:, 0].detach())

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`softmax(L - F) v` over the visible keys."""
        out, soft_mask = attend_visible(
            q, k, v, state.get("soft_mask"), visible, voted, scale, impl=self.config.impl
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
    ) -> tuple[Tensor, Tensor | None]:
        """`softmax(L - F) v` over slots, the votes in place, and who has most of them."""
        if self.config.impl != "auto":
            return super().attend_slots(
                q, k, v, x=x, state=state, positions=positions, newest=newest, scale=scale
            )
        votes = state["soft_mask"][:, 0]
        return attend_slots(q, k, v, votes, positions, newest, scale, grace=grace, first=first)

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`softmax(L - F) v` over what is left; F is computed once, for the evictions and the attention."""
        if self.config.impl != "auto" or q.shape[2] == 1:
            return super().attend_pruned(
                q, k, v, x=x, state=state, positions=positions, scale=scale, evict=evict
            )
        out, soft_mask = attend_pruned(q, k, v, state.get("soft_mask"), positions, scale, evict)
        return out, {"soft_mask": soft_mask}

    def running_state(
        self, q: Tensor, k: Tensor, state: dict[str, Tensor], voted: Tensor, scale: float
    ) -> Tensor:
        """F before every query, (B, T, S): it depends on the votes only, not on what is evicted."""
        dtype = wide_dtype(q)
        logits = q[:, :1].to(dtype) @ k[:, :1].to(dtype).transpose(-1, -2) * scale
        return soft_masks(logits, state.get("soft_mask"), voted)[:, 0, :-1]

    def weights(
        self, q: Tensor, k: Tensor, state: dict[str, Tensor], visible: Tensor, scale: float
    ) -> Tensor:
        """softmax(L - F), (B, H, T, S), for a state that covers all keys."""
        dtype = wide_dtype(q)
        logits = q.to(dtype) @ repeat_kv(k, q.shape[1]).to(dtype).transpose(-1, -2) * scale
        return masked_softmax(logits - state["soft_mask"][:, :, None], visible[:, None])

"""The base classes of scores: what happens to the logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from heedful.attention.config import ScoreConfig
from heedful.ops.dot_product import masked_softmax
from heedful.ops.masks import visible_keys


@dataclass(frozen=True)
class LayerLoss:
    """What a layer adds to the training loss."""

    loss: Tensor
    """(B,), per row, weighted."""
    kept: Tensor
    """(B, T), the tokens that each query still holds, softly counted; 0 at padding. Detached."""


class Selection(NamedTuple):
    """What selection heads of a score's own make of new tokens."""

    q: Tensor
    """(B, R, T, D'), queries."""
    k: Tensor
    """(B, R, T, D'), keys, which are remembered."""
    own_votes: Tensor | None = None
    """(B, R, T), 0 or more: what each token's votes against it begin with, where they may differ; None: 0."""


Select = tuple[Tensor, Tensor] | None
"""Queries (B, R, T, D') and keys (B, R, S, D') of selection heads of a score's own."""


def given(select: Select) -> dict[str, Any]:
    """As a keyword argument, for the methods of a score that has some; nothing for the others."""
    return {} if select is None else {"select": select}


class Score(nn.Module):
    """What happens to the logits; write `forward`, and make it an `EvictableScore` if a cache may evict.

    Args:
        config: the form's own options.
        n_heads: the number of heads that attend.
        d_model: C, the width of `x`, for scores that compute something from it.
    """

    Config: ClassVar[type[ScoreConfig]] = ScoreConfig
    formula: ClassVar[str] = ""
    """What it computes, for `heedful show`."""

    selectors: int = 1
    """Selection heads: one for the layer, or one for each key head, which then holds tokens of its own."""

    bilinear: bool = False
    """Whether it reads queries and keys by their products alone, and returns weighted sums of the values, times a
    number per head and query at most. Then a linear map of the keys may stand in the queries, and one of the values
    in the output, and a form that caches something smaller than its keys decodes without making them."""

    @property
    def causal_to_the_bit(self) -> bool:
        """Whether a later token leaves every bit of an earlier output; else it may change how it is rounded."""
        return True

    def __init__(self, config: ScoreConfig, n_heads: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.n_heads = n_heads
        self.d_model = d_model

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
        """Attend.

        Args:
            q: (B, H, T, D).
            k: (B, G, S, D), S >= T; the last T keys belong to the queries.
            v: (B, G, S, E).
            x: (B, T, C), what the layer was given.
            state: what an earlier call returned, for the S - T earlier keys; empty at the start.
            key_mask: (B, S) bool, False = padding, or None.
            segment_ids: (B, S) integers, or None.
            scale: multiplies the logits.

        Returns:
            out (B, H, T, E), zeros at padded queries, and the state to hand to the next call.
        """
        raise NotImplementedError

    def selection(self, x: Tensor, scale: float) -> Selection | None:
        """Queries and keys of selection heads of the score's own; None, the default: there are none.

        The keys are remembered with the tokens. All other methods are then given both as `select`: queries
        (B, R, T, D') and the keys of all tokens, (B, R, S, D'). Where tokens are evicted, the per-token state of a
        new one begins with its own votes.

        Args:
            x: (B, T, C).
            scale: what will multiply their logits.
        """
        return None

    def reset_parameters(self) -> None:
        """Fresh weights, for a score whose layers need another start than all linear layers have."""

    def identity_parameters(self) -> list[Tensor]:
        """Parameters that hold an identity map, which weight decay must not pull to zero."""
        return []

    def silence(self) -> None:
        """Let selection heads of the score's own cast no vote, for a model that was trained without them."""

    @property
    def silent(self) -> bool:
        """Whether it has selection heads of its own that cast no vote, whatever they read."""
        return False

    def layer_loss(
        self,
        q: Tensor,
        k: Tensor,
        *,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        scale: float,
    ) -> LayerLoss | None:
        """A loss of this layer's own, for scores that train one; None where there is none.

        Args:
            q: (B, H, T, D).
            k: (B, G, T, D).
            key_mask: (B, T) bool, False = padding, or None.
            segment_ids: (B, T) integers, or None.
            scale: multiplies the logits.
        """
        return None


class EvictableScore(Score):
    """A score that also attends to keys in any order, some of them gone: what a cache that evicts needs.

    Write `attend`, and `logits` for the policies that evict by attention weights. All of it has to agree with
    `forward`: `heedful.testing.check_form` compares.
    """

    @property
    def subtracts(self) -> bool:
        """Whether what it ranks tokens by bounds their weight, so that a threshold can certify what is lost."""
        return True

    state_names: ClassVar[list[str]] = []
    """Names of the per-token tensors (B, R, S) in `state`."""

    per_head: ClassVar[list[str]] = []
    """Those of them that hold a number for each of H heads, (B, H, S): they change weights, and rank nobody."""

    spares_first: ClassVar[bool] = True
    """Whether no query may vote on the first real token."""

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
        """`forward` over keys in any order, with ready masks.

        Args:
            q: (B, H, T, D).
            k: (B, G, S, D).
            v: (B, G, S, E).
            x: (B, T, C).
            state: per-token state of the first keys; keys beyond it start at 0.
            visible: (B, T, S) bool, the keys each query attends to.
            voted: (B, T, S) bool, the keys each query may vote on: never its own, nor one that is spared.
            scale: multiplies the logits.

        Returns:
            out (B, H, T, E) and the state for all S keys.
        """
        raise NotImplementedError

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
        """`attend` for one token per row that sees every key; the state is updated in place.

        Args:
            q: (B, H, 1, D).
            k: (B, G, C, D), in any order but for the first real token, which comes first.
            v: (B, G, C, E).
            x: (B, 1, C).
            state: per-token state of all keys, the query's own included.
            positions: (B, C) position of each key in its row.
            newest: (B, 1), where the query's own key is.
            scale: multiplies the logits.
            grace: the newest tokens that never go, the next one included.
            first: the first tokens that never go.
            select: as `selection` gave it, for a score that has some.

        Returns:
            out (B, H, 1, E), and of the slots that may go next the one with the most votes against it, (B, 1), the
            oldest among equals; None where nobody votes or it was not looked for.
        """
        visible = torch.ones_like(positions, dtype=torch.bool)
        voted = self.votable(positions).scatter(-1, newest, False)
        out, after = self.attend(
            q,
            k,
            v,
            x=x,
            state=state,
            visible=visible[:, None],
            voted=voted[:, None],
            scale=scale,
            **given(select),
        )
        check_one_selector(after, self.per_head)
        for name, value in after.items():
            state[name].copy_(value)
        return out, None

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
        """`attend` where keys are evicted as the votes go.

        Args:
            q: (B, H, T, D).
            k: (B, G, S, D); the last T keys belong to the queries.
            v: (B, G, S, E).
            x: (B, T, C).
            state: per-token state of the first S - T keys; the others start at 0.
            positions: (B, S) position of each key in its row, -1 = padding or nothing.
            scale: multiplies the logits.
            evict: from what `running_state` gives, (B, T, S) or None, to the index of the first query that no
                longer sees each key, (B, S) integers; None = all stay.
            select: as `selection` gave it, for a score that has some.

        Returns:
            out (B, H, T, E) and the state for all S keys.
        """
        length = q.shape[2]
        visible, voted = self.visible_and_voted(positions, length)
        gone_at = evict(self.running_state(q, k, state, voted, scale, **given(select)))
        if gone_at is not None:
            visible = visible & (torch.arange(length, device=q.device)[:, None] < gone_at[:, None])
        return self.attend(
            q, k, v, x=x, state=state, visible=visible, voted=voted, scale=scale, **given(select)
        )

    def running_state(
        self, q: Tensor, k: Tensor, state: dict[str, Tensor], voted: Tensor, scale: float
    ) -> Tensor | None:
        """The per-token state before every query, (B, T, S), for policies that rank by it; None: there is none."""
        return None

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
        """What `attend` makes its weights of, for policies that evict by those; arguments as there.

        Returns:
            (B, H, T, S), float32 or wider, before any mask.
        """
        raise NotImplementedError(f"score {self.config.form!r} does not show its attention weights")

    def weights(self, logits: Tensor, visible: Tensor) -> Tensor:
        """What values are multiplied by: the softmax of `logits` over the visible keys, unless a form says else.

        Args:
            logits: (B, H, ..., S), as `logits` gave them.
            visible: bool, broadcastable to them: (B, 1, ..., S).
        """
        return masked_softmax(logits, visible)

    def votable(self, positions: Tensor) -> Tensor:
        """(B, S) bool, the keys that later queries may vote on; `positions` (B, S), -1 = padding or nothing."""
        return positions > 0 if self.spares_first else positions >= 0

    def visible_and_voted(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """What the last T tokens may see, were nobody evicted, and what they may vote on, (B, T, S) bool both.

        Args:
            positions: (B, S) position of each key in its row, -1 = padding or nothing; the last T are the
                queries' own.
            length: T.
        """
        n_keys = positions.shape[1]
        real = (positions >= 0)[:, None] & (positions[:, n_keys - length :, None] >= 0)
        visible = visible_keys(length, n_keys, None, None, positions.device) & real
        return visible, visible.tril(n_keys - length - 1) & self.votable(positions)[:, None]


def check_one_selector(state: dict[str, Tensor], per_head: Sequence[str] = ()) -> None:
    """Raise for state of several selection heads: a slot is free only if all heads let its token go.

    What is named in `per_head` ranks nobody, and may differ from head to head.
    """
    for name, value in state.items():
        if value.shape[1] != 1 and name not in per_head:
            raise ValueError(
                f"a cache that evicts needs one selection head (R = 1), the score's {name!r} has {value.shape[1]}; "
                f"use a cache without a budget"
            )

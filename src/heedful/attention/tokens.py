"""What travels from a layer to its cache and its score."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from heedful.attention.score import LayerLoss, Score

SELECT_K = "select_k"
"""The name of the keys of selection heads among what is remembered."""


class Tokens(NamedTuple):
    """T new tokens of one layer, projected and not yet attended to."""

    x: Tensor
    """(B, T, C), what the layer was given."""
    q: Tensor
    """(B, H, T, D)."""
    memory: dict[str, Tensor]
    """What is remembered of them, by name: (B, G, T, ·) or (B, T)."""
    key_mask: Tensor | None
    """(B, T) bool, False = padding; None: all are real."""
    segment_ids: Tensor | None
    """(B, T) integers of packed documents; None: one per row."""
    select_q: Tensor | None = None
    """(B, R, T, D'), the queries of selection heads of the score's own; their keys are in `memory`. None: none."""
    own_votes: Tensor | None = None
    """(B, R, T), what the votes against each token begin with; None: 0."""

    @classmethod
    def of(
        cls,
        layer: "Layer",
        x: Tensor,
        q: Tensor,
        memory: dict[str, Tensor],
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
    ) -> "Tokens":
        """With what the selection heads of the layer's score make of `x`, where it has some."""
        own = layer.score.selection(x, layer.scale)
        if own is None:
            return cls(x, q, memory, key_mask, segment_ids)
        return cls(x, q, {**memory, SELECT_K: own.k}, key_mask, segment_ids, own.q, own.own_votes)

    @property
    def length(self) -> int:
        """T."""
        return self.x.shape[1]

    def part(self, start: int, n: int) -> "Tokens":
        """Tokens start to start + n."""
        memory = {name: tensor.narrow(token_axis(tensor), start, n) for name, tensor in self.memory.items()}
        key_mask, segment_ids = (mask if mask is None else mask[:, start : start + n] for mask in self[3:5])
        select_q = None if self.select_q is None else self.select_q[:, :, start : start + n]
        x, q = self.x[:, start : start + n], self.q[:, :, start : start + n]
        own_votes = None if self.own_votes is None else self.own_votes[..., start : start + n]
        return Tokens(x, q, memory, key_mask, segment_ids, select_q, own_votes)

    def selection(self, memory: dict[str, Tensor]) -> dict[str, Any]:
        """What a score with selection heads of its own is given beside q and k; `memory`: of all keys."""
        return {} if self.select_q is None else {"select": (self.select_q, memory[SELECT_K])}

    def attend_alone(self, layer: "Layer", losses: list[LayerLoss] | None = None) -> Tensor:
        """Attend among these tokens: the outputs of the heads, (B, H, T, E); `losses` receives the layer's own."""
        k, v = layer.keys_values(self.memory)
        rest: dict[str, Any] = {"key_mask": self.key_mask, "segment_ids": self.segment_ids}
        rest |= {"scale": layer.scale, **self.selection(self.memory)}
        own = None if losses is None else layer.score.layer_loss(self.q, k, **rest)
        if losses is not None and own is not None:
            losses.append(own)
        out, _ = layer.score(self.q, k, v, x=self.x, state={}, **rest)
        return out

    def folded(self, groups: int) -> "Tokens":
        """Each of `groups` key heads with its queries and its selection head as a row of its own, (B·G, ...)."""
        if groups == 1:
            return self

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat_interleave(groups, 0)

        def apart(x: Tensor) -> Tensor:
            return (
                x.unflatten(1, (groups, -1)).flatten(0, 1) if x.ndim == 4 else x.repeat_interleave(groups, 0)
            )

        memory = {name: apart(tensor) for name, tensor in self.memory.items()}
        select_q = None if self.select_q is None else apart(self.select_q)
        masks = rows(self.key_mask), rows(self.segment_ids)
        x = self.x[..., :0].repeat_interleave(groups, 0)  # scores that vote per key head read no x
        own_votes = None if self.own_votes is None else self.own_votes.flatten(0, 1)[:, None]
        return Tokens(x, apart(self.q), memory, *masks, select_q, own_votes)


class Layer(Protocol):
    """What a cache needs of the layer it belongs to; every `Attention` has it."""

    score: Score

    @property
    def scale(self) -> float:
        """Multiplies the logits."""
        ...

    def keys_values(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys (B, G, S, D) and values (B, G, S, E) from what is remembered."""
        ...

    def logit_sizes(self, q: Tensor, k: Tensor, real_q: Tensor, real_k: Tensor) -> Tensor:
        """(B, 2), the largest sizes of queries and keys; no logit exceeds their product."""
        ...


def token_axis(tensor: Tensor) -> int:
    """Which axis of a per-token tensor, (B, G, S, ·), (B, R, S) or (B, S), counts tokens."""
    return 2 if tensor.ndim == 4 else tensor.ndim - 1

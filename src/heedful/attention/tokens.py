"""What travels from a layer to its cache and its score."""

from typing import NamedTuple, Protocol

from torch import Tensor

from heedful.attention.score import Score


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

    @property
    def length(self) -> int:
        """T."""
        return self.x.shape[1]

    def part(self, start: int, n: int) -> "Tokens":
        """Tokens start to start + n."""
        memory = {name: tensor.narrow(token_axis(tensor), start, n) for name, tensor in self.memory.items()}
        masks = (mask if mask is None else mask[:, start : start + n] for mask in self[3:])
        return Tokens(self.x[:, start : start + n], self.q[:, :, start : start + n], memory, *masks)


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

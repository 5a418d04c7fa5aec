"""What a forward pass of the engine reads: which tokens are whose, and where their memories lie."""

from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Some tokens of one request."""

    start: int
    """The first of them in the batch."""
    length: int
    seen: int
    """Tokens that the request has had before."""
    block: int
    """Where its memory is."""


class Singles(NamedTuple):
    """The requests of a batch that decode: one token each, and memory of those before."""

    at: Tensor
    """(n,), their tokens in the batch."""
    blocks: Tensor
    """(n,), where their memories are."""
    seen: Tensor
    """(n,), tokens that each has had before."""


class Batch:
    """The requests of a forward pass.

    Args:
        pieces: of every request, in order.
        device: where the memory is.
    """

    def __init__(self, pieces: list[Piece], device: torch.device) -> None:
        self.pieces = pieces
        """All of them."""
        single = [piece for piece in pieces if piece.length == 1 and piece.seen > 0]
        self.longer = [piece for piece in pieces if piece.length > 1 or piece.seen == 0]
        """Those that read several tokens, or begin."""
        table = torch.tensor([(p.start, p.block, p.seen) for p in single], dtype=torch.long).view(-1, 3)
        self.singles = Singles(*table.T.contiguous().to(device))
        """The others."""

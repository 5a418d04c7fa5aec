"""Taking tokens back: assisted decoding reads a draft and keeps a part of it."""

from collections.abc import Callable
from typing import NamedTuple


class Piece(NamedTuple):
    """Some tokens that were read together, and how to take them back."""

    length: int
    undo: Callable[[], None]
    """Makes the cache what it was before the piece."""
    replay: Callable[[int], None]
    """Reads the first n tokens of the piece again."""


class UndoLog:
    """The pieces that a cache read while it was recording, the last one last."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []

    def add(self, piece: Piece) -> None:
        """Note a piece that was read."""
        self._pieces.append(piece)

    @property
    def tokens(self) -> int:
        """Tokens that can be taken back."""
        return sum(piece.length for piece in self._pieces)

    def take_back(self, n: int) -> None:
        """Undo the last n tokens; a piece that is undone in part is read again as far as it stays.

        Raises:
            ValueError: if fewer tokens were recorded; nothing is changed then.
        """
        if n > self.tokens:
            raise ValueError(
                f"cannot forget {n} tokens, {self.tokens} are recorded; set recording = True before they are read"
            )
        while n > 0:
            piece = self._pieces.pop()
            piece.undo()
            if piece.length > n:
                piece.replay(piece.length - n)
            n -= piece.length

    def clear(self) -> None:
        """What was read so far can no longer be taken back."""
        self._pieces.clear()

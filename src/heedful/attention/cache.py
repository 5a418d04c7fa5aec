"""What a layer remembers of the tokens it has seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.ops.masks import rank_in_segment


@dataclass(frozen=True)
class Piece:
    """Some tokens that were read together, and how to take them back."""

    length: int
    undo: Callable[[], None]
    """Makes the cache what it was before the piece."""
    replay: Callable[[int], None]
    """Reads the first n tokens of the piece again."""


class LayerCache:
    """Named per-token tensors of one layer, growing in blocks.

    Tensors are appended along the token axis: axis 2 of `(B, G, S, ·)`, the last of `(B, S)`. Beside
    them stand the optional `masks` (padding, segments) and the `state` that a score carries from query
    to query, such as the soft mask of selective attention.

    Args:
        block: how many tokens the storage grows by.
    """

    def __init__(self, block: int = 128) -> None:
        self.block = block
        self.seen = 0
        self.recording = False
        """Keep what `crop` needs, until it is called."""
        self._pieces: list[Piece] = []
        self.masks: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        self._storage: dict[str, Tensor] = {}

    @property
    def kept(self) -> int:
        """The number of tokens held, padding included."""
        return self.seen

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, the room for tokens to come included."""
        tensors = [t for group in self._groups() for t in group.values()]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    @property
    def peak_bytes(self) -> int:
        """The most bytes ever held at once."""
        return self.nbytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens held, without the room for tokens to come."""
        tensors = [*(self[n] for n in self._storage), *self.masks.values(), *self.state.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def __getitem__(self, name: str) -> Tensor:
        storage = self._storage[name]
        return storage.narrow(token_axis(storage), 0, self.seen)

    def whole_mask(self, name: str, new: Tensor | None, shape: Sequence[int]) -> Tensor | None:
        """An optional `(B, S)` mask for all tokens, the new ones included.

        Tokens without a key mask are real. Tokens without segment ids before any were given are segment 0,
        and later ones continue the segment of the token before them. None when no token ever had a mask.

        Args:
            name: "key_mask" or "segment_ids".
            new: (B, T), or None.
            shape: (B, T).
        """
        old = self.masks.get(name)
        like = old if new is None else new
        if like is None:
            return None
        if old is None:
            old = like.new_full((shape[0], self.seen), name == "key_mask")
        if old.shape[0] != shape[0]:
            raise another_batch(old.shape[0], shape[0])
        if new is None:
            new = like.new_full(shape, True) if name == "key_mask" else old[:, -1:].expand(shape)
        return torch.cat((old, new), dim=1)

    def remember_mask(self, name: str, mask: Tensor | None) -> None:
        """Keep what `whole_mask` returned for the tokens that follow."""
        if mask is not None:
            self.masks[name] = mask

    def next_positions(
        self,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
    ) -> Tensor:
        """Positions (1 or B, T) of T new tokens: counted over the real tokens of each row and segment."""
        key_mask = self.whole_mask("key_mask", key_mask, (batch, length))
        segment_ids = self.whole_mask("segment_ids", segment_ids, (batch, length))
        return rank_in_segment(self.seen + length, key_mask, segment_ids, device)[:, self.seen :]

    def append(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Add T tokens and return each named tensor for all tokens so far, `(B, G, S, ·)` or `(B, S)`.

        Raises:
            ValueError: if the tensors disagree on T, or the names or the batch size changed.
        """
        lengths = {n: t.shape[token_axis(t)] for n, t in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"all tensors of one append must hold as many tokens, got {lengths}")
        if self.seen and set(tensors) != set(self._storage):
            raise ValueError(f"the cache holds {sorted(self._storage)}, got {sorted(tensors)}")
        total = self.seen + next(iter(lengths.values()))
        for name, tensor in tensors.items():
            self._write(name, tensor, total)
        self.seen = total
        return {name: self[name] for name in tensors}

    def crop(self, n: int) -> None:
        """Forget the last n tokens, as if they had never been read; what is recorded before them is dropped.

        Raises:
            ValueError: if fewer tokens were recorded; nothing is changed then.
        """
        recorded = sum(piece.length for piece in self._pieces)
        if n > recorded:
            raise ValueError(
                f"cannot forget {n} tokens, {recorded} are recorded; set recording = True before they are read"
            )
        while n > 0:
            piece = self._pieces.pop()
            piece.undo()
            if piece.length > n:
                piece.replay(piece.length - n)
            n -= piece.length
        self.drop_record()

    def drop_record(self) -> None:
        """What was read so far can no longer be forgotten by `crop`."""
        self._pieces.clear()

    def record(self, length: int, undo: Callable[[], None], replay: Callable[[int], None]) -> None:
        """Note a piece that was read, for `crop`."""
        self._pieces.append(Piece(length, undo, replay))

    def snapshot(self) -> Callable[[], None]:
        """A function that makes the cache what it is now."""
        seen, masks, state = self.seen, dict(self.masks), dict(self.state)

        def undo() -> None:
            self.seen, self.masks, self.state = seen, dict(masks), dict(state)

        return undo

    def reorder(self, rows: Tensor) -> None:
        """Keep, repeat or permute the rows of the batch: row i becomes row `rows[i]` (beam search)."""
        self._each(lambda t: t.index_select(0, rows.to(t.device)))

    def repeat(self, times: int) -> None:
        """Repeat every row `times` times, copies next to each other."""
        self._each(lambda t: t.repeat_interleave(times, dim=0))

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        self.drop_record()
        for tensors in self._groups():
            tensors.clear()

    def _groups(self) -> tuple[dict[str, Tensor], ...]:
        """All tensors that are held."""
        return self._storage, self.masks, self.state

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.drop_record()
        for tensors in self._groups():
            for name, tensor in tensors.items():
                tensors[name] = change(tensor)

    def _write(self, name: str, new: Tensor, total: int) -> None:
        axis = token_axis(new)
        storage = self._storage.get(name)
        if storage is not None and storage.shape[0] != new.shape[0]:
            raise another_batch(storage.shape[0], new.shape[0])
        if storage is not None and storage.dtype != new.dtype:
            raise another_dtype(name, storage.dtype, new.dtype)
        if torch.is_grad_enabled():
            # Writing in place would break gradients: those of earlier queries need the keys as they were.
            old = [] if storage is None else [storage.narrow(axis, 0, self.seen)]
            self._storage[name] = torch.cat([*old, new], dim=axis)
            return
        if storage is None or storage.shape[axis] < total:
            self._grow(name, new, total)
        self._storage[name].narrow(axis, self.seen, total - self.seen).copy_(new)

    def _grow(self, name: str, like: Tensor, total: int) -> None:
        axis = token_axis(like)
        shape = list(like.shape)
        shape[axis] = -(-total // self.block) * self.block
        grown = like.new_empty(shape)
        if name in self._storage:
            grown.narrow(axis, 0, self.seen).copy_(self[name])
        self._storage[name] = grown


def token_axis(tensor: Tensor) -> int:
    """Which axis of a per-token tensor counts tokens."""
    return 2 if tensor.ndim == 4 else tensor.ndim - 1


def another_batch(held: int, new: int) -> ValueError:
    """The error for rows that the cache does not hold."""
    return ValueError(f"the cache holds {held} sequences but got {new} new ones; use one cache per batch")


def another_dtype(name: str, held: torch.dtype, new: torch.dtype) -> TypeError:
    """What to raise for tokens in another precision than those before."""
    return TypeError(
        f"the cache holds {name} in {held}, got {new}; keep one precision (autocast on or off) from the first "
        f"token to the last, or start a new cache"
    )

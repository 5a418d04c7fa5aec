"""What a layer remembers of the tokens it has seen."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heedful.attention.tokens import Layer, Tokens, token_axis
from heedful.attention.undo import Piece, UndoLog
from heedful.ops.masks import rank_in_segment


class KVCache(ABC):
    """The protocol of all caches of one layer: `attend` remembers new tokens and lets them attend."""

    seen: int
    """Tokens read, padding included."""
    recording: bool
    """Keep what `crop` needs, until it is called."""

    def __init__(self) -> None:
        self.seen = 0
        self.recording = False
        self._log = UndoLog()
        self._apart = 1  # key heads that stand as rows of their own

    def attend(self, layer: Layer, tokens: Tokens) -> Tensor:
        """Remember T new tokens and let them attend: the outputs of the heads, (B, H, T, E).

        Raises:
            ValueError: if the tokens do not fit those before: another batch, other names.
            TypeError: for another precision than that of the tokens held.
        """
        batch, self._apart = tokens.x.shape[0], layer.score.selectors
        out = self._attend_recorded(layer, tokens.folded(self._apart))
        return out if self._apart == 1 else out.unflatten(0, (batch, -1)).flatten(1, 2)

    def _attend_recorded(self, layer: Layer, tokens: Tokens) -> Tensor:
        if not self.recording:
            self._forget_record()  # tokens that are not recorded hide those before them
            return self._attend(layer, tokens)
        undo, grad = self._snapshot(), torch.is_grad_enabled()
        out = self._attend(layer, tokens)

        def replay(n: int) -> None:
            with torch.set_grad_enabled(grad):
                self._attend(layer, tokens.part(0, n))

        self._log.add(Piece(tokens.length, undo, replay))
        return out

    def crop(self, n: int) -> None:
        """Forget the last n tokens, as if they had never been read; what is recorded before them is dropped.

        Raises:
            ValueError: if fewer tokens were recorded; nothing is changed then.
        """
        self._log.take_back(n)
        self._forget_record()

    @property
    def recorded(self) -> int:
        """Tokens that `crop` can take back."""
        return self._log.tokens

    def reorder(self, rows: Tensor) -> None:
        """Keep, repeat or permute the rows of the batch: row i becomes row `rows[i]` (beam search)."""
        if self._apart > 1:
            rows = (rows[:, None] * self._apart + torch.arange(self._apart, device=rows.device)).flatten()
        self._change_rows(lambda t: t.index_select(0, rows.to(t.device)))

    def repeat(self, times: int) -> None:
        """Repeat every row `times` times, copies next to each other."""
        self._change_rows(
            lambda t: t.unflatten(0, (-1, self._apart)).repeat_interleave(times, dim=0).flatten(0, 1)
        )

    @property
    @abstractmethod
    def kept(self) -> int:
        """Tokens held, the maximum over the rows."""

    @property
    def evicted(self) -> int:
        """Real tokens that are gone, over all rows."""
        return 0

    @property
    @abstractmethod
    def padded(self) -> bool:
        """Whether a row ever had padding."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all storages, the room for tokens to come included."""

    @property
    def measures_keys(self) -> bool:
        """Whether it looks at keys themselves, and not only at what a query makes of them."""
        return False

    @property
    def peak_bytes(self) -> int:
        """The most bytes ever held at once."""
        return self.nbytes

    @property
    def used_bytes(self) -> int:
        """Bytes that the tokens held take for good."""
        return self.nbytes

    @property
    def forgotten(self) -> Tensor:
        """(B,) upper bound on the attention mass lost; only a cache with a threshold keeps one.

        Raises:
            ValueError: if the cache keeps none.
        """
        raise ValueError("the bound on what was forgotten is kept with a threshold; give one")

    def next_positions(
        self,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
    ) -> Tensor:
        """Positions (1 or B, T) of T new tokens: counted over the real tokens of each row and segment."""
        n = self._apart
        key_mask = None if key_mask is None else key_mask.repeat_interleave(n, 0)
        segment_ids = None if segment_ids is None else segment_ids.repeat_interleave(n, 0)
        return self._next_positions(key_mask, segment_ids, batch * n, length, device)[::n]

    @abstractmethod
    def _next_positions(
        self,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
    ) -> Tensor:
        """`next_positions`, for the rows that are held."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def _attend(self, layer: Layer, tokens: Tokens) -> Tensor:
        """`attend`, whatever is recorded."""

    @abstractmethod
    def _snapshot(self) -> Callable[[], None]:
        """A function that makes the cache what it is now."""

    @abstractmethod
    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor, (B, ...) each; what is recorded is dropped."""

    def _forget_record(self) -> None:
        self._log.clear()


class LayerCache(KVCache):
    """Everything is kept: named per-token tensors, growing in blocks.

    Tensors are appended along the token axis: axis 2 of `(B, G, S, ·)`, the last of `(B, S)`. Beside
    them stand the optional `masks` (padding, segments) and the `state` that a score carries from query
    to query, such as the soft mask of selective attention.

    Args:
        block: how many tokens the storage grows by.
    """

    def __init__(self, block: int = 128) -> None:
        super().__init__()
        self.block = block
        self.masks: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        self._storage: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"LayerCache({self.seen} tokens, {self.used_bytes:,} bytes)"

    @property
    def kept(self) -> int:
        """The number of tokens held, padding included."""
        return self.seen

    @property
    def padded(self) -> bool:
        """Whether a row ever had padding."""
        return "key_mask" in self.masks

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, the room for tokens to come included."""
        tensors = [t for group in self._groups() for t in group.values()]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens held, without the room for tokens to come."""
        tensors = [*(self[n] for n in self._storage), *self.masks.values(), *self.state.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def __getitem__(self, name: str) -> Tensor:
        storage = self._storage[name]
        return storage.narrow(token_axis(storage), 0, self.seen)

    def _next_positions(
        self,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
    ) -> Tensor:
        key_mask = self._whole_mask("key_mask", key_mask, (batch, length))
        segment_ids = self._whole_mask("segment_ids", segment_ids, (batch, length))
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

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        self._forget_record()
        for tensors in self._groups():
            tensors.clear()

    def _attend(self, layer: Layer, tokens: Tokens) -> Tensor:
        x, q, memory, key_mask, segment_ids = tokens[:5]
        masks = {
            name: self._whole_mask(name, mask, x.shape[:2])
            for name, mask in (("key_mask", key_mask), ("segment_ids", segment_ids))
        }
        everything = self.append(**memory)
        k, v = layer.keys_values(everything)
        self.masks |= {name: mask for name, mask in masks.items() if mask is not None}
        own = tokens.selection(everything)
        out, self.state = layer.score(q, k, v, x=x, state=self.state, scale=layer.scale, **masks, **own)
        return out

    def _whole_mask(self, name: str, new: Tensor | None, shape: Sequence[int]) -> Tensor | None:
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

    def _snapshot(self) -> Callable[[], None]:
        seen, masks, state = self.seen, dict(self.masks), dict(self.state)

        def undo() -> None:
            self.seen, self.masks, self.state = seen, dict(masks), dict(state)

        return undo

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._forget_record()
        for tensors in self._groups():
            for name, tensor in tensors.items():
                tensors[name] = change(tensor)

    def _groups(self) -> tuple[dict[str, Tensor], ...]:
        """All tensors that are held."""
        return self._storage, self.masks, self.state

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


def another_batch(held: int, new: int) -> ValueError:
    """The error for rows that the cache does not hold."""
    return ValueError(f"the cache holds {held} sequences but got {new} new ones; use one cache per batch")


def another_dtype(name: str, held: torch.dtype, new: torch.dtype) -> TypeError:
    """What to raise for tokens in another precision than those before."""
    return TypeError(
        f"the cache holds {name} in {held}, got {new}; keep one precision (autocast on or off) from the first "
        f"token to the last, or start a new cache"
    )

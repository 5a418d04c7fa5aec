"""Slots: storage of a fixed number of tokens per row, where a new token overwrites one that is gone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from heedful.attention.cache import another_batch, another_dtype
from heedful.attention.tokens import token_axis
from heedful.ops.precision import wide_dtype


class Slots:
    """Named tensors of the tokens in C slots per row, and their positions.

    Slot 0 holds the first real token of its row; the others are unordered.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        """What the layer remembers: (B, G, C, ·) or (B, C)."""
        self.state: dict[str, Tensor] = {}
        """The score's per-token state, (B, R, C)."""
        self.book: dict[str, Tensor] = {}
        """"positions" (B, C), -1 = empty; "arrived" (B, 1), real tokens read; "scores" (B, C) or (B, N, C)."""
        self._spare = 0  # places behind the slots, while a long piece is read
        self._journal: list[tuple[str, Tensor, Tensor]] | None = None

    @property
    def filled(self) -> bool:
        """Whether there are slots yet."""
        return len(self.book) > 0

    @property
    def positions(self) -> Tensor:
        """(B, C) position of the token in each slot, -1 = empty."""
        return self.book["positions"]

    @property
    def arrived(self) -> Tensor:
        """(B, 1) real tokens read."""
        return self.book["arrived"]

    @property
    def count(self) -> int:
        """C."""
        return self.positions.shape[1]

    @property
    def groups(self) -> tuple[dict[str, Tensor], ...]:
        """All tensors that are held."""
        return self.tensors, self.state, self.book

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(t.untyped_storage().nbytes() for group in self.groups for t in group.values())

    def check(self, memory: dict[str, Tensor], batch: int) -> None:
        """Raise for tokens in another precision than those held (TypeError), or of other rows (ValueError)."""
        if self.filled and self.positions.shape[0] != batch:
            raise another_batch(self.positions.shape[0], batch)
        for name, new in memory.items():
            if name in self.tensors and self.tensors[name].dtype != new.dtype:
                raise another_dtype(name, self.tensors[name].dtype, new.dtype)

    # Reading.

    def held(self) -> dict[str, Tensor]:
        """The named tensors of the slots."""
        return self.first(self.count) if self._spare else dict(self.tensors)

    def first(self, n: int) -> dict[str, Tensor]:
        """The named tensors of the first n slots."""
        return {name: t.narrow(token_axis(t), 0, n) for name, t in self.tensors.items()}

    def with_new(self, memory: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        """The named tensors of the first n slots with new tokens behind them; nothing is remembered of those."""
        if not self._spare:
            held = self.first(n)
            return {name: torch.cat((held[name], new), dim=token_axis(new)) for name, new in memory.items()}
        everything = {}
        for name, new in memory.items():
            storage, axis = self.tensors[name], token_axis(new)
            storage.narrow(axis, n, new.shape[axis]).copy_(new)
            everything[name] = storage.narrow(axis, 0, n + new.shape[axis])
        return everything

    # Writing.

    def overwrite(
        self,
        memory: dict[str, Tensor],
        slot: Tensor,
        scores: Tensor | None = None,
        state: Tensor | None = None,
    ) -> None:
        """Put one real token per row into slot (B, 1), with a policy's scores and a score's state, or 0."""
        for name, value in memory.items():
            self._keep_for_undo(name, slot)
            _scatter(self.tensors[name], slot, value)  # of the same type: `check`
        self.positions.scatter_(-1, slot, self.arrived)
        if scores is not None:
            _scatter(self.book["scores"], slot, scores)
        for storage in self.state.values():
            if state is None:
                storage.scatter_(-1, _index(slot, storage), 0.0)
            else:
                storage.scatter_(-1, slot[:, None], state.to(storage.dtype))
        self.book["arrived"] += 1

    def write(
        self,
        memory: dict[str, Tensor],
        positions: Tensor,
        slot: Tensor,
        real: Tensor | None,
        state: dict[str, Tensor] | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Put n tokens per row into slots.

        Args:
            memory: named tensors, (B, G, n, ·) or (B, n).
            positions: (B, n).
            slot: (B, n), where they go.
            real: (B, n) bool, the tokens that are written; None: all.
            state: the score's state (B, R, n); None: it starts at 0.
            scores: (B, n) or (B, N, n), for a policy with scores of its own.
        """

        def put(storage: Tensor, new: Tensor) -> None:
            if real is not None:
                new = torch.where(_aligned(real, storage), new, _gather(storage, slot))
            _scatter(storage, slot, new)

        for name, value in memory.items():
            self._keep_for_undo(name, slot)
            put(self.tensors[name], value.to(self.tensors[name].dtype))
        put(self.positions, positions)
        if scores is not None:
            put(self.book["scores"], scores)
        for name, storage in self.state.items():
            zeros = storage.shape[0], storage.shape[1], slot.shape[-1]
            put(storage, storage.new_zeros(zeros) if state is None else state[name].to(storage.dtype))

    def pack(
        self,
        memory: dict[str, Tensor],
        positions: Tensor,
        state: dict[str, Tensor],
        alive: Tensor,
        scores: Tensor | None,
    ) -> None:
        """Write what survived of a piece of several tokens; there must be room.

        Args:
            memory: named tensors of the new tokens, (B, G, T, ·) or (B, T).
            positions: (B, T) of the new tokens, -1 for padding.
            state: the score's state of the slots in use and of the new tokens, (B, R, n + T).
            alive: (B, n + T) bool, the survivors.
            scores: (B, T) or (B, N, T), for a policy with scores of its own.
        """
        length, slots, n = positions.shape[1], self.count, positions.shape[1]
        survives, arrives = alive.split([alive.shape[1] - length, length], dim=1)
        if length > 1:  # worth asking the device
            n = int(arrives.sum(-1).max())
        survives = padded_to(survives, slots, 0)
        self.positions.masked_fill_(~survives, -1)
        for name, value in state.items():
            held = padded_to(value[..., : value.shape[-1] - length], slots, 0)
            self.state[name].copy_(held.masked_fill(~survives[:, None], 0.0))
        if n:
            free, new = _first(~survives, n), _first(arrives, n)
            # With one row, all n are real; with several, rows may get fewer.
            real = None if length > 1 and alive.shape[0] == 1 else arrives.gather(-1, new)
            self.write(
                {name: _gather(tensor, new) for name, tensor in memory.items()},
                positions.gather(-1, new),
                free,
                real,
                {name: _gather(value[..., -length:], new) for name, value in state.items()},
                None if scores is None else _gather(scores, new),
            )
        self.book["arrived"] += (positions >= 0).sum(-1, keepdim=True)

    # Size.

    def allocate(
        self, memory: dict[str, Tensor], state: dict[str, Tensor], n: int, scores: Tensor | None
    ) -> None:
        """Make n empty slots for tokens like those of `memory`, with a score's state and a policy's scores."""
        like = next(iter(memory.values()))
        batch, device = like.shape[0], like.device
        for name, value in memory.items():
            shape = list(value.shape)
            shape[token_axis(value)] = n + self._spare
            self.tensors[name] = value.new_zeros(shape)
        self.book["positions"] = torch.full((batch, n), -1, device=device)
        self.book["arrived"] = torch.zeros(batch, 1, dtype=torch.long, device=device)
        if scores is not None:
            self.book["scores"] = scores.new_zeros(*scores.shape[:-1], n)
        for name, value in state.items():
            self.state[name] = torch.zeros(batch, value.shape[1], n, dtype=wide_dtype(like), device=device)

    def grow_to(self, n: int) -> None:
        """Have n slots."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = padded_to(tensor, n + self._spare, 0, token_axis(tensor))
        self._lengthen(n)

    def _lengthen(self, n: int) -> None:
        """Books and state for n slots."""
        for name, value in (("positions", -1), ("scores", 0)):
            if name in self.book:
                self.book[name] = padded_to(self.book[name], n, value)
        self.state = {name: padded_to(tensor, n, 0) for name, tensor in self.state.items()}

    @contextmanager
    def spare(self, n: int) -> Iterator[None]:
        """While a piece is read in several blocks: room behind the slots for the tokens of one block."""
        if self._journal is not None:  # slots are overwritten time and again: keep them all, once
            for name, storage in self.tensors.items():
                slot = torch.arange(self.count, device=storage.device).expand(storage.shape[0], -1)
                self._journal.append((name, slot, storage.clone()))
            self._journal = None
        self._resize_spare(n)
        try:
            yield
        finally:
            self._resize_spare(0)

    def _resize_spare(self, n: int) -> None:
        self._spare = n
        for name, tensor in self.tensors.items():
            axis = token_axis(tensor)
            held = tensor.narrow(axis, 0, self.count)
            self.tensors[name] = padded_to(held, self.count + n, 0, axis) if n else held.clone()

    # Undoing.

    def snapshot(self) -> Callable[[], None]:
        """A function that makes the slots what they are now; until `forget_record`, what is overwritten is kept."""
        if not self.filled:
            return self.clear
        book = {name: tensor.clone() for name, tensor in self.book.items()}
        state = {name: tensor.clone() for name, tensor in self.state.items()}
        journal: list[tuple[str, Tensor, Tensor]] = []
        self._journal = journal

        def undo() -> None:
            self._journal = None
            for name, slot, old in reversed(journal):
                _scatter(self.tensors[name], slot, old)
            n = self.count  # slots that came since then stay
            self.book, self.state = dict(book), dict(state)
            self._lengthen(n)

        return undo

    def forget_record(self) -> None:
        """What is overwritten need not be kept any longer."""
        self._journal = None

    def clear(self) -> None:
        """No slots."""
        self._journal = None
        for tensors in self.groups:
            tensors.clear()

    def _keep_for_undo(self, name: str, slot: Tensor) -> None:
        if self._journal is not None:
            self._journal.append((name, slot, _gather(self.tensors[name], slot)))


def padded_to(tensor: Tensor, size: int, value: int, axis: int = -1) -> Tensor:
    """Lengthened to `size` along `axis`."""
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat((tensor, tensor.new_full(shape, value)), dim=axis) if shape[axis] else tensor


def _first(where: Tensor, n: int) -> Tensor:
    """(B, n), where the first n True of (B, S) are; what follows where a row has fewer does not matter."""
    if n > 1 and where.shape[0] == 1:
        return where[0].nonzero()[:n, 0][None]  # there are n: faster
    return where.int().argsort(dim=-1, descending=True, stable=True)[:, :n]


def _aligned(slot: Tensor, storage: Tensor) -> Tensor:
    """(B, n) -> (B, 1, n, 1) for a storage of four axes, (B, n) for two, (B, 1, n) for three."""
    return slot[:, None, :, None] if storage.ndim == 4 else slot[:, None] if storage.ndim == 3 else slot


def _index(slot: Tensor, storage: Tensor) -> Tensor:
    shape = list(storage.shape)
    shape[token_axis(storage)] = slot.shape[-1]
    return _aligned(slot, storage).expand(shape)


def _gather(storage: Tensor, slot: Tensor) -> Tensor:
    """The tokens in the slots (B, n)."""
    if storage.ndim == 4 and storage.shape[0] == 1:
        return storage.index_select(2, slot[0])
    if storage.ndim == 4 and slot.shape[-1] > 1:
        return storage[_rows_and_groups(slot, storage)]  # whole vectors: faster than gather
    return storage.gather(token_axis(storage), _index(slot, storage))


def _scatter(storage: Tensor, slot: Tensor, value: Tensor) -> None:
    """Overwrite the slots (B, n)."""
    if torch.compiler.is_compiling() and storage.ndim == 4:
        # The compiler writes this one in place, where it copies the whole storage for the others.
        storage.index_put_(_rows_and_groups(slot, storage), value)
    elif storage.shape[0] == 1:
        storage.index_copy_(token_axis(storage), slot[0], value)
    elif storage.ndim == 4 and slot.shape[-1] > 1:
        storage.index_put_(_rows_and_groups(slot, storage), value)
    else:
        storage.scatter_(token_axis(storage), _index(slot, storage), value)


def _rows_and_groups(slot: Tensor, storage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What indexes the first three axes of a storage (B, G, C, ·) by slots (B, n)."""
    row = torch.arange(storage.shape[0], device=slot.device)[:, None, None]
    group = torch.arange(storage.shape[1], device=slot.device)[None, :, None]
    return row, group, slot[:, None]

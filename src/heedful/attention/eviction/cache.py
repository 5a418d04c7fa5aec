"""A cache of slots: it holds a budget of tokens, and a new token overwrites the one that is evicted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from heedful.attention.cache import LayerCache, another_batch, another_dtype, token_axis
from heedful.attention.eviction.policy import Policy, get_policy
from heedful.attention.eviction.rule import Rule
from heedful.ops.selective.slots import least_needed_slot


class EvictingCache(LayerCache):
    """At most `budget` real tokens of one layer, in slots allocated once.

    Slots are unordered but for slot 0, which holds the first real token of its row; `positions` says what the
    others hold, -1 = empty. Padding occupies no slot. A piece of several tokens is attended as a whole, with a
    mask that says who was evicted when, and what survives is written into the slots afterwards; a single
    token is written in place.

    Args:
        budget: tokens held while a query attends, the first and the newest included; >= 2. None = no bound,
            with a threshold: the slots grow in blocks.
        policy: which token goes: a name or a `Policy`.
        evict_every: evict only at positions divisible by it; up to evict_every - 1 more tokens are held.
        threshold: F above which a token goes, whatever the budget; for the selective policy. The cache then
            keeps a bound on what was lost, `forgotten`.
        block: slots that are added at once where there is no budget.

    Raises:
        ValueError: for a budget below 2, an `evict_every` below 1, a threshold that is no finite number above
            0 or does not go with the policy, neither budget nor threshold, or an unknown policy.
    """

    def __init__(
        self,
        budget: int | None,
        policy: str | Policy = "selective",
        evict_every: int = 1,
        threshold: float | None = None,
        block: int = 128,
    ) -> None:
        super().__init__(block)
        self.rule = Rule(budget, evict_every, threshold)
        self.policy = get_policy(policy) if isinstance(policy, str) else policy
        if threshold is not None and not self.policy.selective:
            raise ValueError(
                f"a threshold is compared with the votes F and needs the policy 'selective', "
                f"got {self.policy.name!r}; leave the threshold out"
            )
        self.ragged = False
        """Whether a row ever had padding, so that rows may hold different numbers of tokens."""
        self._book: dict[str, Tensor] = {}
        self._room = 0  # slots that are free for certain, where there is no budget
        self._peak = 0
        self._next_slot: Tensor | None = None  # (B, 1), the one that goes next, where the last step said so
        self._extra = 0  # places behind the slots, while a long piece is read
        self._journal: list[tuple[str, Tensor, Tensor]] | None = None

    @property
    def n_slots(self) -> int:
        """Slots per row."""
        bound = self.rule.n_slots
        return self.positions.shape[1] if bound is None else bound

    @property
    def kept(self) -> int:
        """The number of real tokens held, the maximum over the rows."""
        return int((self.positions >= 0).sum(-1).max()) if self.filled else 0

    @property
    def evicted(self) -> int:
        """The number of real tokens that are gone, over all rows."""
        return int(self._book["arrived"].sum() - (self.positions >= 0).sum()) if self.filled else 0

    @property
    def peak_bytes(self) -> int:
        """The most bytes ever held at once: the slots, and the piece that was being read."""
        return max(self._peak, self.nbytes)

    @property
    def forgotten(self) -> Tensor:
        """(B,) upper bound on the attention mass that evictions have cost any query of any head.

        A key with F votes against it weighs at most exp(2m - F) for every later query, if no logit exceeds m in
        size: the query itself has F = 0. With QK-norm m follows from the gains, and the bound holds for all
        queries to come; without, it is measured, and the bound holds for the queries so far.

        Raises:
            ValueError: if the cache has no threshold.
        """
        if self.rule.threshold is None:
            raise ValueError("the bound on what was forgotten is kept with a threshold; give one")
        if not self.filled:
            return torch.zeros(0)
        reach = self._book["reach"].prod(-1, keepdim=True)
        return (2 * reach + self._book["lost"]).clamp(max=0.0).exp()[:, 0]

    @property
    def filled(self) -> bool:
        """Whether there are slots yet."""
        return bool(self._book)

    @property
    def positions(self) -> Tensor:
        """(B, C) position of the token in each slot, -1 = empty."""
        return self._book["positions"]

    @property
    def scores(self) -> Tensor:
        """(B, C) what the policy thinks of each token; F for the selective policy."""
        return self.state["soft_mask"][:, 0] if self.policy.selective else self._book["scores"]

    def __getitem__(self, name: str) -> Tensor:
        return self._storage[name]

    def positions_of(self, real: Tensor) -> Tensor:
        """(B, T) position of each new token in its row, -1 for padding; real is (B, T) bool."""
        self.check_rows(real.shape[0])
        arrived = self._book.get("arrived", real.new_zeros(real.shape[0], 1, dtype=torch.long))
        return torch.where(real, arrived + real.long().cumsum(-1) - 1, -1)

    def note_piece(self, memory: dict[str, Tensor]) -> None:
        """Count what a piece of several tokens held beside the slots, for `peak_bytes`."""
        piece = sum(t.numel() * t.element_size() for t in memory.values())
        self._peak = max(self._peak, self.nbytes + piece)

    @contextmanager
    def long_piece(self, block: int) -> Iterator[None]:
        """While a piece is read in several blocks: room behind the slots for the tokens of one block."""
        if self._journal is not None:  # slots are overwritten time and again: keep them all, once
            for name, storage in self._storage.items():
                slot = torch.arange(self.positions.shape[1], device=storage.device).expand(
                    storage.shape[0], -1
                )
                self._journal.append((name, slot, storage.clone()))
            self._journal = None
        self._resize_storage(block)
        try:
            yield
        finally:
            self._resize_storage(0)

    def beside(self, memory: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """As `in_use`, with the tensors of new tokens behind those of the slots; nothing is remembered of them."""
        held, state, positions = self.in_use()
        if not self._extra:
            held = {name: torch.cat((held[name], new), dim=token_axis(new)) for name, new in memory.items()}
            return held, state, positions
        used = positions.shape[1]
        for name, new in memory.items():
            storage, axis = self._storage[name], token_axis(new)
            storage.narrow(axis, used, new.shape[axis]).copy_(new)
            held[name] = storage.narrow(axis, 0, used + new.shape[axis])
        return held, state, positions

    def check_dtypes(self, memory: dict[str, Tensor]) -> None:
        """Raise TypeError for tokens in another precision than those held."""
        for name, new in memory.items():
            if name in self._storage and self._storage[name].dtype != new.dtype:
                raise another_dtype(name, self._storage[name].dtype, new.dtype)

    def check_rows(self, batch: int) -> None:
        """Raise unless the cache holds as many rows, or none yet."""
        if self.filled and self.positions.shape[0] != batch:
            raise another_batch(self.positions.shape[0], batch)

    def next_positions(
        self,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
    ) -> Tensor:
        """Positions (B, T) of T new tokens, 0 at padding."""
        return self.positions_of(real_tokens(key_mask, batch, length, device)).clamp(min=0)

    def held(self) -> dict[str, Tensor]:
        """The named tensors of the slots, (B, G, C, ·) or (B, C)."""
        if not self._extra:
            return dict(self._storage)
        slots = self.positions.shape[1]
        return {name: t.narrow(token_axis(t), 0, slots) for name, t in self._storage.items()}

    def in_use(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Tensors, state and positions of the slots in use, for rows that hold equally many tokens."""
        if self.seen >= self.n_slots:  # a shape that the compiler can rely on
            return self.held(), dict(self.state), self.positions
        n = self.seen
        tensors = {name: t.narrow(token_axis(t), 0, n) for name, t in self._storage.items()}
        return tensors, {name: t[..., :n] for name, t in self.state.items()}, self.positions[:, :n]

    def put_next(self, memory: dict[str, Tensor], state_names: Sequence[str]) -> Tensor:
        """Write one real token per row in place of the least needed one; `rule` must be a plain budget.

        The first token comes by `pack`.

        Args:
            memory: named tensors of one token, (B, G, 1, ·) or (B, 1).
            state_names: names of the score's per-token state, which starts at 0.

        Returns:
            (B, 1), the slots it went to.
        """
        assert self.rule.budget is not None
        arrived = self._book["arrived"]
        if self.seen < self.rule.budget:
            slot = torch.full_like(arrived, self.seen)
        elif self._next_slot is not None:
            slot = self._next_slot
        else:
            priority = self.policy.priority(self.scores, self.positions, arrived, self.rule.budget)
            slot = least_needed_slot(priority, self.positions)
        self._next_slot = None
        for name, value in memory.items():
            self._keep_for_undo(name, slot)
            _scatter(self._storage[name], slot, value.to(self._storage[name].dtype))
        self.positions.scatter_(-1, slot, arrived)
        if not self.policy.selective:
            self.scores.scatter_(-1, slot, self.policy.start(arrived))
        for name in state_names:
            self.state[name].scatter_(-1, slot[:, None], 0.0)
        arrived += 1
        self.seen += 1
        return slot

    def plan(self, most_voted: Tensor | None) -> None:
        """Note the slot with the most votes, (B, 1), if it is the one that goes next."""
        if self.policy.selective and type(self.policy).priority is Policy.priority:
            self._next_slot = most_voted

    def put_one(self, memory: dict[str, Tensor], positions: Tensor, state_names: Sequence[str]) -> None:
        """Make room for one token per row and write it; a padded token leaves its row alone.

        The first token comes by `pack`.

        Args:
            memory: named tensors of one token, (B, G, 1, ·) or (B, 1).
            positions: (B, 1), -1 for padding.
            state_names: names of the score's per-token state, which starts at 0.
        """
        if self.rule.budget is None:
            self._make_room()
        real = positions >= 0
        before = self.positions >= 0
        priority = self.policy.priority(self.scores, self.positions, positions, self.rule.budget or 0)
        alive = self.rule.evict(before, priority, self.positions, positions, room=1)
        if self.rule.threshold is not None:
            self.forget(before & ~alive, self.scores)
        self.positions.masked_fill_(~alive, -1)
        slot = (~alive).int().argmax(-1, keepdim=True)
        self._write(memory, positions, slot, real, self._zeros(state_names, slot))
        self._book["arrived"] += real.long()
        self.seen += 1

    def pack(
        self,
        memory: dict[str, Tensor],
        positions: Tensor,
        state: dict[str, Tensor],
        alive: Tensor,
    ) -> None:
        """Write what survived a piece of several tokens into the slots.

        Args:
            memory: named tensors of the new tokens, (B, G, T, ·) or (B, T).
            positions: (B, T) of the new tokens, -1 for padding.
            state: the score's per-token state of held and new tokens, (B, 1, C + T).
            alive: (B, C + T) bool, the survivors, at most as many as there are slots; C are the slots in use.
        """
        self._next_slot = None
        length = positions.shape[1]
        survives, arrives = alive.split([alive.shape[1] - length, length], dim=1)
        stays, n, slots = 0, length, self.rule.n_slots
        if slots is None:
            stays = int(alive.sum(-1).max())
        if length > 1:  # worth asking the device
            n = int(arrives.sum(-1).max())
        if not self.filled:
            self._allocate(memory, list(state), self._blocks_for(stays) if slots is None else slots)
        elif stays > self.positions.shape[1]:
            self._grow_to(self.positions.shape[1] + self._blocks_for(stays - self.positions.shape[1]))
        slots = self.positions.shape[1]
        survives = _padded(survives, slots, 0)
        self.positions.masked_fill_(~survives, -1)
        for name, value in state.items():
            held = _padded(value[..., : value.shape[-1] - length], slots, 0)
            self.state[name].copy_(held.masked_fill(~survives[:, None], 0.0))
        if n:
            free, new = _first(~survives, n), _first(arrives, n)
            # With one row, all n are real; with several, rows may get fewer.
            real = None if length > 1 and alive.shape[0] == 1 else arrives.gather(-1, new)
            chosen = {name: _gather(tensor, new) for name, tensor in memory.items()}
            fresh = {name: value[..., -length:].gather(-1, new[:, None]) for name, value in state.items()}
            self._write(chosen, positions.gather(-1, new), free, real, fresh)
        self._book["arrived"] += (positions >= 0).sum(-1, keepdim=True)
        self.seen += length
        self._room = 0

    def forget(self, gone: Tensor, soft_mask: Tensor) -> None:
        """Add evicted tokens to the bound on what was lost.

        Args:
            gone: (..., B, S) bool.
            soft_mask: the same shape, F at their eviction.
        """
        cost = (-soft_mask).masked_fill(~gone, -torch.inf).logsumexp(-1, keepdim=True)
        self._book["lost"] = torch.logaddexp(self._book["lost"], cost.to(self._book["lost"].dtype))

    def reach(self, logit_sizes: Tensor) -> None:
        """Note the sizes (B, 2) of queries and keys that occur; apart, as a query may meet any evicted key."""
        self._book["reach"] = torch.maximum(self._book["reach"], logit_sizes.to(self._book["reach"].dtype))

    def snapshot(self) -> Callable[[], None]:
        """A function that makes the cache what it is now: what is overwritten from here on is kept."""
        if not self.filled:
            return self._clear
        seen, ragged, next_slot = self.seen, self.ragged, self._next_slot
        book = {name: tensor.clone() for name, tensor in self._book.items()}
        state = {name: tensor.clone() for name, tensor in self.state.items()}
        journal: list[tuple[str, Tensor, Tensor]] = []
        self._journal = journal

        def undo() -> None:
            self._journal = None
            for name, slot, old in reversed(journal):
                _scatter(self._storage[name], slot, old)
            slots = self.positions.shape[1]
            book["positions"] = _padded(book["positions"], slots, -1)
            self._book = {n: _padded(t, slots, 0) if n == "scores" else t for n, t in book.items()}
            self.state = {name: _padded(tensor, slots, 0) for name, tensor in state.items()}
            self.seen, self.ragged, self._room, self._next_slot = seen, ragged, 0, next_slot

        return undo

    def drop_record(self) -> None:
        super().drop_record()
        self._journal = None

    def reset(self) -> None:
        super().reset()
        self._clear()
        self._peak = 0

    def _clear(self) -> None:
        self.seen, self.ragged, self._room, self._journal, self._next_slot = 0, False, 0, None, None
        for tensors in self._groups():
            tensors.clear()

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._each(change)
        self._next_slot = None

    def _groups(self) -> tuple[dict[str, Tensor], ...]:
        return *super()._groups(), self._book

    def _allocate(self, memory: dict[str, Tensor], state_names: Sequence[str], slots: int) -> None:
        like = next(iter(memory.values()))
        batch, device = like.shape[0], like.device
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        for name, value in memory.items():
            shape = list(value.shape)
            shape[token_axis(value)] = slots + self._extra
            self._storage[name] = value.new_zeros(shape)
        self._book["positions"] = torch.full((batch, slots), -1, device=device)
        self._book["arrived"] = torch.zeros(batch, 1, dtype=torch.long, device=device)
        if not self.policy.selective:
            self._book["scores"] = torch.zeros(batch, slots, device=device)
        if self.rule.threshold is not None:
            self._book["lost"] = torch.full((batch, 1), -torch.inf, dtype=wide, device=device)
            self._book["reach"] = torch.zeros(batch, 2, dtype=wide, device=device)
        for name in state_names:
            self.state[name] = torch.zeros(batch, 1, slots, dtype=wide, device=device)
        self._room = slots

    def _make_room(self) -> None:
        """A free slot in every row, where there is no budget; asks the device only once in many tokens."""
        if self._room < 1:
            self._room = self.positions.shape[1] - self.kept
            if self._room < max(1, self.block // 2):
                self._grow_to(self.positions.shape[1] + self.block)
                self._room += self.block
        self._room -= 1

    def _blocks_for(self, tokens: int) -> int:
        """Slots for that many tokens, in whole blocks; one at least."""
        return -(-max(1, tokens) // self.block) * self.block

    def _grow_to(self, slots: int) -> None:
        for name, tensor in self._storage.items():
            self._storage[name] = _padded(tensor, slots + self._extra, 0, token_axis(tensor))
        self._book["positions"] = _padded(self.positions, slots, -1)
        self.state = {name: _padded(tensor, slots, 0) for name, tensor in self.state.items()}

    def _resize_storage(self, extra: int) -> None:
        """Have so many places behind the slots."""
        self._extra = extra
        if self.filled:
            slots = self.positions.shape[1]
            for name, tensor in self._storage.items():
                axis = token_axis(tensor)
                held = tensor.narrow(axis, 0, slots)
                self._storage[name] = _padded(held, slots + extra, 0, axis) if extra else held.clone()

    def _zeros(self, state_names: Sequence[str], slot: Tensor) -> dict[str, Tensor]:
        """What the per-token state of new tokens starts at."""
        return {
            name: slot.new_zeros(slot.shape, dtype=self.state[name].dtype)[:, None] for name in state_names
        }

    def _keep_for_undo(self, name: str, slot: Tensor) -> None:
        if self._journal is not None:
            self._journal.append((name, slot, _gather(self._storage[name], slot)))

    def _write(  # type: ignore[override]
        self,
        memory: dict[str, Tensor],
        positions: Tensor,
        slot: Tensor,
        real: Tensor | None,
        state: dict[str, Tensor],
    ) -> None:
        """Put n tokens per row, (B, n), into slots (B, n) where they are real; `state` is (B, 1, n)."""
        self._next_slot = None

        def where_real(new: Tensor, storage: Tensor) -> Tensor:
            if real is None:
                return new
            return torch.where(_aligned(real, storage), new, _gather(storage, slot))

        for name, value in memory.items():
            storage = self._storage[name]
            self._keep_for_undo(name, slot)
            _scatter(storage, slot, where_real(value.to(storage.dtype), storage))
        if not self.policy.selective:
            _scatter(self.scores, slot, where_real(self.policy.start(positions), self.scores))
        _scatter(self.positions, slot, where_real(positions, self.positions))
        for name, value in state.items():
            storage = self.state[name]
            _scatter(storage, slot, where_real(value.to(storage.dtype), storage))


def real_tokens(key_mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """(B, T) bool: the key mask, or ones."""
    return key_mask if key_mask is not None else torch.ones(batch, length, dtype=torch.bool, device=device)


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


def _padded(tensor: Tensor, size: int, value: int, axis: int = -1) -> Tensor:
    """Lengthened to `size` along `axis`."""
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat((tensor, tensor.new_full(shape, value)), dim=axis) if shape[axis] else tensor

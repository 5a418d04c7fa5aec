"""A cache of slots: it holds a budget of tokens, and a new token overwrites the one that is evicted."""

import torch
from torch import Tensor

from heedful.attention.cache import LayerCache, token_axis
from heedful.attention.eviction.policy import Policy, get_policy
from heedful.attention.eviction.rule import check_budget, evict


class EvictingCache(LayerCache):
    """At most `budget` real tokens of one layer, in slots allocated once.

    Slots are unordered; `positions` says what they hold, -1 = empty. Padding occupies no slot. A piece of
    several tokens is attended as a whole, with a mask that says who was evicted when, and packed into the
    slots afterwards; a single token is written in place.

    Args:
        budget: tokens held while a query attends, the first and the newest included; >= 2.
        policy: which token goes: a name or a `Policy`.
        evict_every: evict only at positions divisible by it; up to evict_every - 1 more tokens are held.

    Raises:
        ValueError: for a budget below 2, an `evict_every` below 1, or an unknown policy.
    """

    def __init__(self, budget: int, policy: str | Policy = "selective", evict_every: int = 1) -> None:
        super().__init__()
        check_budget(budget, evict_every)
        self.budget = budget
        self.policy = get_policy(policy) if isinstance(policy, str) else policy
        self.evict_every = evict_every
        self.n_slots = budget + evict_every - 1
        self._book: dict[str, Tensor] = {}

    @property
    def kept(self) -> int:
        """The number of real tokens held, the maximum over the rows."""
        return int((self.positions >= 0).sum(-1).max()) if self.filled else 0

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

    def next_positions(self, real: Tensor) -> Tensor:
        """(B, T) position of each new token in its row, -1 for padding."""
        arrived = self._book.get("arrived", real.new_zeros(real.shape[0], 1, dtype=torch.long))
        return torch.where(real, arrived + real.long().cumsum(-1) - 1, -1)

    def real_tokens(self, key_mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """(B, T) bool: the key mask, or ones."""
        return (
            key_mask if key_mask is not None else torch.ones(batch, length, dtype=torch.bool, device=device)
        )

    def held(self) -> dict[str, Tensor]:
        """The named tensors of the slots, (B, G, C, ·) or (B, C)."""
        return dict(self._storage)

    def put_one(self, memory: dict[str, Tensor], positions: Tensor, state_names: list[str]) -> None:
        """Make room for one token per row and write it in place; a padded token leaves its row alone.

        Args:
            memory: named tensors of one token, (B, G, 1, ·) or (B, 1).
            positions: (B, 1), -1 for padding.
            state_names: names of the score's per-token state, which starts at 0.
        """
        if not self.filled:
            self._allocate(memory, positions, state_names)
        real = positions >= 0
        due = real[:, 0] & (positions[:, 0] % self.evict_every == 0)
        priority = self.policy.priority(self.scores, self.positions, positions, self.budget)
        alive = evict(
            self.positions >= 0, priority, self.positions, positions, self.budget - 1, self.evict_every, due
        )
        self.positions.masked_fill_(~alive, -1)
        slot = (~alive).int().argmax(-1, keepdim=True)
        for name, value in memory.items():
            _write(self._storage[name], value, slot, real)
        _write(self.positions, positions, slot, real)
        if not self.policy.selective:
            _write(self.scores, self.policy.start(positions), slot, real)
        for name in state_names:
            state = self.state[name]
            _write(state, state.new_zeros(*state.shape[:-1], 1), slot, real)
        self._book["arrived"] += real.long()
        self.seen += 1

    def pack(
        self,
        memory: dict[str, Tensor],
        positions: Tensor,
        scores: Tensor | None,
        state: dict[str, Tensor],
        alive: Tensor,
        n_new: int,
    ) -> None:
        """Keep what survived a piece of several tokens.

        Args:
            memory: named tensors of held and new tokens, (B, G, S, ·) or (B, S).
            positions: (B, S).
            scores: (B, S), or None for the selective policy, whose scores are in the state.
            state: the score's per-token state, (B, R, S).
            alive: (B, S) bool, the survivors, at most as many as there are slots.
            n_new: tokens in the piece, padding included.
        """
        arrived = positions[:, -n_new:].amax(-1, keepdim=True) + 1
        before = self._book.get("arrived", torch.zeros_like(arrived))
        order = alive.int().argsort(dim=-1, descending=True, stable=True)[:, : self.n_slots]
        survives = alive.gather(-1, order)
        self._storage = {n: self._take(t, order) for n, t in memory.items()}
        self._book = {
            "arrived": torch.maximum(before, arrived),
            "positions": self._take(positions.masked_fill(~alive, -1), order, empty=-1),
        }
        if scores is not None:
            self._book["scores"] = self._take(scores, order)
        self.state = {
            n: self._take(t, order).masked_fill(~self._pad(survives)[:, None], 0.0) for n, t in state.items()
        }
        self.seen += n_new

    def _groups(self) -> tuple[dict[str, Tensor], ...]:
        return *super()._groups(), self._book

    def _allocate(self, memory: dict[str, Tensor], positions: Tensor, state_names: list[str]) -> None:
        batch = positions.shape[0]
        for name, value in memory.items():
            shape = list(value.shape)
            shape[token_axis(value)] = self.n_slots
            self._storage[name] = value.new_zeros(shape)
        self._book["positions"] = positions.new_full((batch, self.n_slots), -1)
        self._book["arrived"] = positions.new_zeros(batch, 1)
        if not self.policy.selective:
            self._book["scores"] = torch.zeros(batch, self.n_slots, device=positions.device)
        for name in state_names:
            dtype = next(iter(memory.values())).dtype
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            self.state[name] = torch.zeros(batch, 1, self.n_slots, dtype=wide, device=positions.device)

    def _take(self, tensor: Tensor, order: Tensor, empty: int = 0) -> Tensor:
        """The chosen tokens, padded to all slots."""
        axis = token_axis(tensor)
        index = order
        while index.ndim < tensor.ndim:
            index = index.unsqueeze(1) if axis == tensor.ndim - 1 or index.ndim < 3 else index.unsqueeze(-1)
        shape = list(tensor.shape)
        shape[axis] = order.shape[-1]
        taken = tensor.gather(axis, index.expand(shape))
        shape[axis] = self.n_slots - order.shape[-1]
        return torch.cat((taken, tensor.new_full(shape, empty)), dim=axis) if shape[axis] else taken

    def _pad(self, alive: Tensor) -> Tensor:
        missing = self.n_slots - alive.shape[-1]
        return torch.nn.functional.pad(alive, (0, missing)) if missing else alive


def _write(storage: Tensor, value: Tensor, slot: Tensor, real: Tensor) -> None:
    """storage[row, ..., slot[row], ...] = value[row] where the token is real."""
    axis = token_axis(storage)
    index, where = slot, real
    for _ in range(storage.ndim - 2):
        last = axis != storage.ndim - 1 and index.ndim == axis + 1
        index = index.unsqueeze(-1) if last else index.unsqueeze(1)
        where = where.unsqueeze(-1) if last else where.unsqueeze(1)
    index = index.expand(value.shape)
    storage.scatter_(axis, index, torch.where(where, value.to(storage.dtype), storage.gather(axis, index)))

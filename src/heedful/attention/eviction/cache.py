"""A cache of slots: it holds a budget of tokens, and a new token overwrites the one that is evicted."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from heedful.attention.cache import KVCache
from heedful.attention.eviction.bound import LossBound
from heedful.attention.eviction.observed import observed_departures, paid_attention
from heedful.attention.eviction.policy import Policy, get_policy
from heedful.attention.eviction.slots import Slots
from heedful.attention.score import EvictableScore, Score, check_one_selector
from heedful.attention.tokens import Layer, Tokens, token_axis
from heedful.ops.eviction import Rule, departures, least_needed_slot
from heedful.ops.precision import wide_dtype

BLOCK = 192
"""Tokens of a piece that attend together."""
AT_ONCE = 1024
"""Slots up to which a bound is allocated at once; a larger one may be far more than the text will ever fill."""


class EvictingCache(KVCache):
    """At most `budget` real tokens of one layer, in slots allocated once, or as tokens come where there are many.

    Slots are unordered but for slot 0, which holds the first real token of its row; `positions` says what the
    others hold, -1 = empty. Padding occupies no slot. A piece of several tokens is attended as a whole, with a
    mask that says who was evicted when, and what survives is written into the slots afterwards; a single
    token is written in place.

    Args:
        budget: tokens held while a query attends, those that never go included; >= first + grace. None = no bound,
            with a threshold: the slots grow in blocks.
        policy: which token goes: a name or a `Policy`.
        evict_every: evict only at positions divisible by it; up to evict_every - 1 more tokens are held.
        threshold: F above which a token goes, whatever the budget; for the selective policy. The cache then
            keeps a bound on what was lost, `forgotten`.
        grace: the newest tokens that never go, the one that has just arrived included.
        first: the first tokens that never go.
        block: slots that are added at once where there is no bound; under a large one they are added by halves.
        window: a query sees the last so many tokens, its own included, as in a layer with a sliding window.

    Raises:
        ValueError: for what `Rule` refuses, a threshold that does not go with the policy, or an unknown policy.
    """

    def __init__(
        self,
        budget: int | None,
        policy: str | Policy = "selective",
        evict_every: int = 1,
        threshold: float | None = None,
        grace: int = 1,
        first: int = 1,
        block: int = 128,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.block = block
        self.rule = Rule(budget, evict_every, threshold, grace, first, window)
        self.policy = get_policy(policy) if isinstance(policy, str) else policy
        if threshold is not None and self.policy.ranks_by is None:
            raise ValueError(
                f"a threshold is compared with the votes F and needs the policy 'selective', "
                f"got {self.policy.name!r}; leave the threshold out"
            )
        self.slots = Slots()
        self._padded = False
        self._bound: LossBound | None = None
        self._room = 0  # slots that are free for certain, while they grow
        self._peak = 0
        self._next_slot: Tensor | None = None  # (B, 1), the one that goes next, where the last step said so

    def __repr__(self) -> str:
        rule = [f"budget={self.rule.budget}", f"policy={self.policy.name!r}"]
        rule += [f"evict_every={self.rule.evict_every}"] if self.rule.evict_every > 1 else []
        rule += [f"threshold={self.rule.threshold}"] if self.rule.threshold is not None else []
        rule += [f"{name}={getattr(self.rule, name)}" for name in ("grace", "first") if not self.rule.plain]
        rule += [f"window={self.rule.window}"] if self.rule.window is not None else []
        return f"EvictingCache({', '.join(rule)}: {self.seen} tokens seen, {self.kept} kept, {self.nbytes:,} bytes)"

    @property
    def n_slots(self) -> int:
        """Slots per row, so far."""
        return self.slots.count if self.slots.filled else 0

    @property
    def kept(self) -> int:
        """The number of real tokens held, the maximum over the rows."""
        return int((self.positions >= 0).sum(-1).max()) if self.slots.filled else 0

    @property
    def evicted(self) -> int:
        """The number of real tokens that are gone, over all rows; the mean of key heads that evict apart."""
        gone = int(self.slots.arrived.sum() - (self.positions >= 0).sum()) if self.slots.filled else 0
        return gone // self._apart

    @property
    def padded(self) -> bool:
        """Whether a row ever had padding, so that rows may hold different numbers of tokens."""
        return self._padded

    @property
    def measures_keys(self) -> bool:
        """A policy may rank by keys, and the bound of a threshold goes by the norms of keys and queries."""
        return self.policy.needs_keys or self.rule.threshold is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the slots and their books."""
        bound = 0 if self._bound is None else sum(t.untyped_storage().nbytes() for t in self._bound)
        return self.slots.nbytes + bound

    @property
    def peak_bytes(self) -> int:
        """The most bytes ever held at once: the slots, and the piece that was being read."""
        return max(self._peak, self.nbytes)

    @property
    def forgotten(self) -> Tensor:
        """(B,) upper bound on the attention mass that evictions have cost any query of any head.

        With QK-norm the sizes of logits follow from the gains, and the bound holds for all queries to come;
        without, they are measured, and the bound holds for the queries so far (`LossBound`).

        Raises:
            ValueError: if the cache has no threshold.
        """
        if self.rule.threshold is None:
            return super().forgotten
        mass = torch.zeros(0) if self._bound is None else self._bound.mass()
        return mass.unflatten(0, (-1, self._apart)).amax(-1)

    @property
    def positions(self) -> Tensor:
        """(B, C) position of the token in each slot, -1 = empty; (B·G, C) if each key head evicts for itself."""
        return self.slots.positions

    @property
    def scores(self) -> Tensor:
        """(B, C) what the policy thinks of each token; (B, N, C) where it remembers N numbers of each."""
        ranks_by = self.policy.ranks_by
        return self.slots.book["scores"] if ranks_by is None else self.slots.state[ranks_by][:, 0]

    def _next_positions(
        self,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
    ) -> Tensor:
        self.slots.check({}, batch)
        return self._positions_of(_real_tokens(key_mask, batch, length, device)).clamp(min=0)

    def reset(self) -> None:
        """Forget everything."""
        self._forget_record()
        self._clear()
        self._peak = 0

    def _attend(self, layer: Layer, tokens: Tokens) -> Tensor:
        """The outputs of the heads under the stepwise rule.

        Raises:
            TypeError: for another precision than that of the tokens held.
            ValueError: if the policy does not go with the score, or the score has several selection heads.
            RuntimeError: while gradients are on: training never evicts.
        """
        score = self._check(layer, tokens)
        batch, length = tokens.x.shape[:2]
        if not length:
            return tokens.attend_alone(layer)
        if tokens.key_mask is not None:
            self._padded = True
        real = _real_tokens(tokens.key_mask, batch, length, tokens.x.device)
        if length == 1:
            return self._part(layer, score, tokens, real)
        with self.slots.spare(BLOCK) if length > BLOCK else nullcontext():
            outputs = []
            for start in range(0, length, BLOCK):
                n = min(BLOCK, length - start)
                outputs.append(self._part(layer, score, tokens.part(start, n), real[:, start : start + n]))
            piece = sum(t.numel() * t.element_size() for t in tokens.memory.values())
            self._peak = max(self._peak, self.nbytes + piece)
        return torch.cat(outputs, dim=2)

    def _check(self, layer: Layer, tokens: Tokens) -> EvictableScore:
        """The layer's score, if it can do what is asked."""
        if tokens.segment_ids is not None:
            raise ValueError("packed segments and a cache that evicts do not go together")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (tokens.q, *tokens.memory.values())):
            raise RuntimeError(
                "a cache that evicts cannot be trained through; use torch.no_grad() or no budget"
            )
        score = check_score(layer.score, self.policy, self.rule.threshold)
        self.slots.check(tokens.memory, tokens.x.shape[0])
        return score

    def _part(self, layer: Layer, score: EvictableScore, tokens: Tokens, real: Tensor) -> Tensor:
        """A block of tokens, or one, by the way that fits."""
        if tokens.length > 1 or not self.slots.filled:
            return self._block(layer, score, tokens, real)
        rule = self.rule
        # under a window slot 0 is not the first token's for ever
        if not self.padded and rule.evict_every == 1 and rule.threshold is None and rule.window is None:
            return self._next(layer, score, tokens)
        return self._one(layer, score, tokens, real)

    def _next(self, layer: Layer, score: EvictableScore, tokens: Tokens) -> Tensor:
        """One real token in every row, under a plain budget: all slots in use are visible."""
        slot = self._overwrite(layer, tokens)
        held, state, positions = self._in_use()
        k, v = layer.keys_values(held)
        own = tokens.selection(held)
        if self.policy.needs_weights:
            visible = torch.ones_like(positions, dtype=torch.bool)[:, None]
            voted = score.votable(positions).scatter(-1, slot, False)[:, None]
            logits = self._logits(layer, score, tokens, k, state, voted, own)
            weights = paid_attention(score, logits[:, :, 0], visible)
            scores = self.scores[..., : positions.shape[1]]
            scores.copy_(self.policy.update(scores, weights, self.slots.arrived - 1))
        out, next_slot = score.attend_slots(
            tokens.q,
            k,
            v,
            x=tokens.x,
            state=state,
            positions=positions,
            newest=slot,
            scale=layer.scale,
            grace=self.rule.grace,
            first=self.rule.first,
            **own,
        )
        if self.policy.ranks_by is not None and type(self.policy).priority is Policy.priority:
            self._next_slot = next_slot
        return out

    def _one(self, layer: Layer, score: EvictableScore, tokens: Tokens, real: Tensor) -> Tensor:
        """One token per row, or padding, under any rule."""
        newest = self._positions_of(real)
        self._replace_one(layer, tokens, newest)
        held = self.slots.held()
        k, v = layer.keys_values(held)
        own = tokens.selection(held)
        positions, state = self.positions, self.slots.state
        if self._bound is not None:
            self._bound = self._bound.met(layer.logit_sizes(tokens.q, k, real, positions >= 0))
        visible = ((positions >= 0) & real)[:, None]
        voted = visible & (score.votable(positions) & (positions != newest))[:, None]
        if self.policy.needs_weights:
            logits = self._logits(layer, score, tokens, k, state, voted, own)
            weights = paid_attention(score, logits[:, :, 0], visible)
            updated = self.policy.update(self.scores, weights, newest)
            self.scores.copy_(
                torch.where(visible[:, 0] if updated.ndim == 2 else visible, updated, self.scores)
            )
        out, after = score.attend(
            tokens.q, k, v, x=tokens.x, state=state, visible=visible, voted=voted, scale=layer.scale, **own
        )
        check_one_selector(after, score.per_head)
        for name, value in after.items():
            state[name].copy_(value)
        return out

    def _block(self, layer: Layer, score: EvictableScore, tokens: Tokens, real: Tensor) -> Tensor:
        """Some tokens at once: votes do not depend on evictions, so they give those first, then all attend."""
        length, memory = tokens.length, tokens.memory
        newest = self._positions_of(real)
        policy, rule = self.policy, self.rule
        own_scores = self._start(newest, tokens.q)
        positions, everything, rated = newest, memory, own_scores
        state: dict[str, Tensor] = {}
        if self.slots.filled:
            _, state, held = self._in_use()
            before = held.shape[1]
            everything = self.slots.with_new(memory, before)
            positions = torch.cat((held, newest), dim=1)
            if own_scores is not None:
                rated = torch.cat((self.scores[..., :before], own_scores), dim=-1)
            # what was just written is in the processor's cache
            memory = {n: t.narrow(token_axis(t), before, length) for n, t in everything.items()}
        if tokens.own_votes is not None:
            state = _with_own(state, tokens.own_votes, score.state_names)
        k, v = layer.keys_values(everything)
        own = tokens.selection(everything)
        gone_at: Tensor | None = None
        lost: Tensor | None = None
        if policy.observes:
            assert rated is not None
            logits = None
            if policy.needs_weights:
                voted = score.visible_and_voted(positions, length)[1]
                logits = self._logits(layer, score, tokens, k, state, voted, own)
            gone_at, rated = observed_departures(rule, policy, score, rated, positions, length, logits, k)
            if self.slots.filled:
                self.scores[..., :before].copy_(rated[..., :before])
            own_scores = rated[..., -length:]

        def evict(rows: Tensor | None) -> Tensor | None:
            nonlocal gone_at, lost
            if policy.observes:
                return gone_at
            # alone at the start, a token stays: nothing to look at, and the step compiles
            if length == 1 or (rule.threshold is None and self.seen + length <= rule.untouched):
                return None
            if rated is None:
                assert rows is not None
                priority = rows
            else:
                everywhere = rated[:, None].expand(-1, length, -1)
                flat = everywhere.flatten(0, 1), positions[:, None].expand_as(everywhere).flatten(0, 1)
                priority = policy.priority(*flat, newest.reshape(-1, 1), rule.budget or 0).view_as(everywhere)
            gone_at = departures(rule, priority, positions)
            if rule.threshold is not None:
                lost = priority.gather(1, gone_at.clamp(max=length - 1)[:, None])[:, 0]
            return gone_at

        out, state = score.attend_pruned(
            tokens.q,
            k,
            v,
            x=tokens.x,
            state=state,
            positions=positions,
            scale=layer.scale,
            evict=evict,
            **own,
        )
        check_one_selector(state, score.per_head)
        alive = positions >= 0
        if gone_at is not None:
            alive &= gone_at == length
        self._pack(memory, newest, state, alive, own_scores)
        if lost is not None and gone_at is not None:
            assert self._bound is not None
            sizes = layer.logit_sizes(tokens.q, k, real, positions >= 0)
            hidden = rule.hidden(positions, newest.gather(-1, gone_at.clamp(max=length - 1)))
            self._bound = self._bound.evicted((gone_at < length) & ~hidden, lost).met(sizes)
        return out

    @staticmethod
    def _logits(
        layer: Layer,
        score: EvictableScore,
        tokens: Tokens,
        k: Tensor,
        state: dict[str, Tensor],
        voted: Tensor,
        own: dict[str, Any],
    ) -> Tensor:
        """(B, H, T, S), what the weights are made of; state, voted and own as in `attend`."""
        return score.logits(tokens.q, k, x=tokens.x, state=state, voted=voted, scale=layer.scale, **own)

    def _rate(self, layer: Layer) -> None:
        """Let the policy look at the keys in the slots, if it does."""
        if self.policy.needs_keys:
            k, _ = layer.keys_values(self.slots.held())
            self.scores.copy_(self.policy.rate(k, self.positions >= 0))

    def _start(self, positions: Tensor, like: Tensor) -> Tensor | None:
        """A policy's own scores of new tokens, as wide as the attention that they add up; None: it has none."""
        if self.policy.ranks_by is not None:
            return None
        return self.policy.start(positions).to(wide_dtype(like))

    def _positions_of(self, real: Tensor) -> Tensor:
        """(B, T) position of each new token in its row, -1 for padding; real is (B, T) bool."""
        count = real.long().cumsum(-1)
        arrived = self.slots.arrived + count if self.slots.filled else count
        return torch.where(real, arrived - 1, -1)

    def _in_use(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Tensors, state and positions of the slots in use, for rows that hold equally many tokens."""
        if self.seen >= self.n_slots:  # a shape that the compiler can rely on
            return self.slots.held(), dict(self.slots.state), self.positions
        n = self.seen
        state = {name: t[..., :n] for name, t in self.slots.state.items()}
        return self.slots.first(n), state, self.positions[:, :n]

    def _overwrite(self, layer: Layer, tokens: Tokens) -> Tensor:
        """Write one real token per row in place of the least needed one, under a plain budget: the slots (B, 1)."""
        assert self.rule.budget is not None
        arrived = self.slots.arrived
        if self.seen < self.rule.budget:
            if self.seen == self.slots.count:
                self._grow_to(self.seen + 1)
            slot = torch.full_like(arrived, self.seen)
        elif self._next_slot is not None:
            slot = self._next_slot
        else:
            self._rate(layer)
            priority = self.policy.priority(self.scores, self.positions, arrived, self.rule.budget)
            slot = least_needed_slot(priority, self.positions, arrived, self.rule.grace, self.rule.first)
        self._next_slot = None
        scores = self._start(arrived, tokens.q)
        self.slots.overwrite(tokens.memory, slot, scores, tokens.own_votes)
        self.seen += 1
        return slot

    def _replace_one(self, layer: Layer, tokens: Tokens, positions: Tensor) -> None:
        """Make room for one token per row and write it; a padded token, position -1, leaves its row alone."""
        self._next_slot = None
        if self._grows:
            self._make_room()
        real, before = positions >= 0, self.positions >= 0
        self._rate(layer)
        priority = self.policy.priority(self.scores, self.positions, positions, self.rule.budget or 0)
        alive = self.rule.evict(before, priority, self.positions, positions, room=1)
        if self._bound is not None:
            hidden = self.rule.hidden(self.positions, positions)
            self._bound = self._bound.evicted(before & ~alive & ~hidden, self.scores)
        self.positions.masked_fill_(~alive, -1)
        slot = (~alive).int().argmax(-1, keepdim=True)
        scores = self._start(positions, tokens.q)
        own = tokens.own_votes
        state = None if own is None else {name: own for name in self.slots.state}
        self.slots.write(tokens.memory, positions, slot, real, state, scores)
        self.slots.book["arrived"] += real.long()
        self.seen += 1

    def _pack(
        self,
        memory: dict[str, Tensor],
        positions: Tensor,
        state: dict[str, Tensor],
        alive: Tensor,
        scores: Tensor | None,
    ) -> None:
        """Write what survived a piece of several tokens, as `Slots.pack`, in as many slots as that takes."""
        self._next_slot = None
        several = positions.shape[1] > 1  # then the device is asked in any case
        stays = int(alive.sum(-1).max()) if self._grows or several else 0
        bound = self.rule.n_slots
        if bound is not None and stays > bound:
            raise self._not_numbers(memory, stays, bound)
        if not self.slots.filled:
            n = self._in_blocks(stays) if bound is None else min(bound, max(AT_ONCE, self._in_blocks(stays)))
            self.slots.allocate(memory, state, n, scores)
            if self.rule.threshold is not None:
                like = next(iter(memory.values()))
                self._bound = LossBound.nothing_lost(like.shape[0], wide_dtype(like), like.device)
        elif stays > self.slots.count:
            self._grow_to(stays)
        self.slots.pack(memory, positions, state, alive, scores)
        self.seen += positions.shape[1]
        self._room = 0

    def _not_numbers(self, memory: dict[str, Tensor], stays: int, bound: int) -> ValueError:
        """Why nobody was found to go: what is compared with NaN is never the largest."""
        where = ", ".join(_not_finite(memory)) or "what it ranks by"
        return ValueError(
            f"{stays} tokens are left where {bound} fit: the scores of policy {self.policy.name!r} are not "
            f"numbers, as there are NaN or infinities in {where} of the tokens read; look for them in the weights "
            f"of the model, and in what it is given"
        )

    def _make_room(self) -> None:
        """A free slot in every row, while slots grow; asks the device only once in many tokens."""
        if self._room < 1:
            kept = self.kept
            if self.slots.count - kept < max(1, self.block // 2):
                self._grow_to(self.slots.count + 1)
            self._room = self.slots.count - kept
        self._room -= 1

    @property
    def _grows(self) -> bool:
        """Whether there may be more slots than there are."""
        bound = self.rule.n_slots
        return bound is None or bound > (self.slots.count if self.slots.filled else AT_ONCE)

    def _grow_to(self, n: int) -> None:
        """At least n slots, in whole blocks and never beyond the bound."""
        bound, now = self.rule.n_slots, self.slots.count
        # by halves, so that all copies together cost no more than a few of the last
        more = n - now if bound is None else max(n - now, now // 2)
        n = now + self._in_blocks(more)
        self.slots.grow_to(n if bound is None else min(n, bound))

    def _in_blocks(self, tokens: int) -> int:
        """Slots for that many tokens, in whole blocks; one at least."""
        return -(-max(1, tokens) // self.block) * self.block

    def _snapshot(self) -> Callable[[], None]:
        if not self.slots.filled:
            return self._clear
        seen, padded, next_slot, bound = self.seen, self._padded, self._next_slot, self._bound
        undo_slots = self.slots.snapshot()

        def undo() -> None:
            undo_slots()
            self.seen, self._padded, self._room, self._next_slot = seen, padded, 0, next_slot
            self._bound = bound

        return undo

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._forget_record()
        self._next_slot = None
        for tensors in self.slots.groups:
            for name, tensor in tensors.items():
                tensors[name] = change(tensor)
        if self._bound is not None:
            self._bound = LossBound(*map(change, self._bound))

    def _forget_record(self) -> None:
        super()._forget_record()
        self.slots.forget_record()

    def _clear(self) -> None:
        self.seen, self._padded, self._room, self._next_slot, self._bound = 0, False, 0, None, None
        self.slots.clear()


def _not_finite(memory: dict[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinities."""
    return [name for name, t in memory.items() if t.is_floating_point() and not t.isfinite().all()]


def _with_own(state: dict[str, Tensor], own: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The per-token state (B, 1, S - T), that of new tokens, (B, 1, T), behind it."""
    return {name: torch.cat((state[name], own.to(state[name].dtype)), -1) if state else own for name in names}


def _real_tokens(key_mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """(B, T) bool: the key mask, or ones."""
    return key_mask if key_mask is not None else torch.ones(batch, length, dtype=torch.bool, device=device)


def check_score(score: Score, policy: Policy, threshold: float | None) -> EvictableScore:
    """The score, if a cache may evict under it.

    Raises:
        ValueError: if the policy or the threshold does not go with it.
    """
    name = score.config.form
    if not isinstance(score, EvictableScore):
        raise ValueError(
            f"score {name!r} does not support caches that evict: it is no EvictableScore; use a cache "
            f"without a budget"
        )
    another = "use another policy, e.g. 'streaming' (on the command line: --kv-policy streaming)"
    if policy.ranks_by is not None and policy.ranks_by not in score.state_names:
        raise ValueError(
            f"the eviction policy {policy.name!r} needs score 'selective', this layer has {name!r}; {another}"
        )
    if policy.ranks_by in score.per_head:
        raise ValueError(
            f"the eviction policy {policy.name!r} ranks by {policy.ranks_by!r}, of which each head "
            f"of score {name!r} has its own; {another}"
        )
    if threshold is not None and not score.subtracts:
        raise ValueError(
            "a threshold bounds what is lost where votes are subtracted from the logits (subtract=True); this "
            "layer's only say who goes: use a budget"
        )
    return score

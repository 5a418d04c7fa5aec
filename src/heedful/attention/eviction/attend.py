"""Attention over an evicting cache: evict, attend, vote, for one token or for many at once."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heedful.attention.cache import token_axis
from heedful.attention.eviction.cache import EvictingCache, real_tokens
from heedful.attention.eviction.departures import departures

if TYPE_CHECKING:
    from heedful.attention.base import Attention

BLOCK = 192
"""Tokens of a piece that attend together."""


def attend_evicting(
    layer: "Attention",
    x: Tensor,
    q: Tensor,
    memory: dict[str, Tensor],
    key_mask: Tensor | None,
    cache: EvictingCache,
) -> Tensor:
    """The outputs of the heads, (B, H, T, E), under the stepwise rule; the cache is updated.

    Args:
        layer: the attention whose score attends.
        x: (B, T, C).
        q: (B, H, T, D).
        memory: named tensors of the new tokens.
        key_mask: (B, T) bool, False = padding, or None.
        cache: what is held.

    Raises:
        TypeError: for another precision than that of the tokens held.
        ValueError: if the policy does not go with the score, or the score has several selection heads.
        RuntimeError: while gradients are on: training never evicts.
    """
    if torch.is_grad_enabled() and q.requires_grad:
        raise RuntimeError("a cache that evicts cannot be trained through; use torch.no_grad() or no budget")
    if cache.policy.selective and "soft_mask" not in layer.score.state_names:
        raise ValueError(
            f"the eviction policy 'selective' needs score 'selective', this layer has "
            f"{layer.config.score_config.form!r}; use another policy, e.g. 'streaming'"
        )
    batch, length = x.shape[:2]
    cache.check_rows(batch)
    cache.check_dtypes(memory)
    if key_mask is not None:
        cache.ragged = True
    real = real_tokens(key_mask, batch, length, x.device)
    if length == 1:
        return _part(layer, x, q, memory, real, cache)
    together = 1 if cache.policy.needs_weights else BLOCK
    starts = range(0, length, together)
    with cache.long_piece(BLOCK) if 1 < together < length else nullcontext():
        outputs = []
        for start in starts:
            n = min(together, length - start)
            now = {name: tensor.narrow(token_axis(tensor), start, n) for name, tensor in memory.items()}
            part = slice(start, start + n)
            outputs.append(_part(layer, x[:, part], q[:, :, part], now, real[:, part], cache))
        cache.note_piece(memory)
    return torch.cat(outputs, dim=2)


def _part(
    layer: "Attention",
    x: Tensor,
    q: Tensor,
    memory: dict[str, Tensor],
    real: Tensor,
    cache: EvictingCache,
) -> Tensor:
    """A block of tokens, or one, by the way that fits."""
    if x.shape[1] > 1 or not cache.filled:  # without state of ours, the score shows what state it keeps
        return _block(layer, x, q, memory, real, cache)
    if not cache.ragged and cache.rule.evict_every == 1 and cache.rule.threshold is None:
        return _next(layer, x, q, memory, cache)
    return _one(layer, x, q, memory, real, cache)


def _next(
    layer: "Attention", x: Tensor, q: Tensor, memory: dict[str, Tensor], cache: EvictingCache
) -> Tensor:
    """One real token in every row, under a plain budget: all slots in use are visible."""
    slot = cache.put_next(memory, layer.score.state_names)
    held, state, positions = cache.in_use()
    k, v = layer.keys_values(held)
    scale = layer.config.qk_dim**-0.5
    if cache.policy.needs_weights:
        visible = torch.ones_like(positions, dtype=torch.bool)[:, None]
        weights = layer.score.weights(q, k, state, visible, scale)[:, :, 0]
        scores = cache.scores[:, : positions.shape[1]]
        scores.copy_(cache.policy.update(scores, weights))
    out, next_slot = layer.score.attend_slots(
        q, k, v, x=x, state=state, positions=positions, newest=slot, scale=scale
    )
    cache.plan(next_slot)
    return out


def _one(
    layer: "Attention",
    x: Tensor,
    q: Tensor,
    memory: dict[str, Tensor],
    real: Tensor,
    cache: EvictingCache,
) -> Tensor:
    """One token per row, or padding, under any rule."""
    newest = cache.positions_of(real)
    cache.put_one(memory, newest, layer.score.state_names)
    k, v = layer.keys_values(cache.held())
    positions = cache.positions
    if cache.rule.threshold is not None:
        cache.reach(layer.logit_sizes(q, k, real, positions >= 0))
    visible = ((positions >= 0) & real)[:, None]
    voted = visible & ((positions > 0) & (positions != newest))[:, None]
    scale = layer.config.qk_dim**-0.5
    if cache.policy.needs_weights:
        weights = layer.score.weights(q, k, cache.state, visible, scale)[:, :, 0]
        updated = cache.policy.update(cache.scores, weights)
        cache.scores.copy_(torch.where(visible[:, 0], updated, cache.scores))
    out, state = layer.score.attend(
        q, k, v, x=x, state=cache.state, visible=visible, voted=voted, scale=scale
    )
    check_one_selector(state)
    for name, value in state.items():
        cache.state[name].copy_(value)
    return out


def _block(
    layer: "Attention",
    x: Tensor,
    q: Tensor,
    memory: dict[str, Tensor],
    real: Tensor,
    cache: EvictingCache,
) -> Tensor:
    """Some tokens at once: votes do not depend on who was evicted, so those give the evictions, then all attend."""
    length = real.shape[1]
    newest = cache.positions_of(real)
    policy, rule = cache.policy, cache.rule
    positions, everything, rated = newest, memory, policy.start(newest)
    state: dict[str, Tensor] = {}
    if cache.filled:
        everything, state, held = cache.beside(memory)
        positions = torch.cat((held, newest), dim=1)
        if not policy.selective:
            rated = torch.cat((cache.scores[:, : held.shape[1]], rated), dim=1)
        # what was just written is in the processor's cache
        before = held.shape[1]
        memory = {n: t.narrow(token_axis(t), before, length) for n, t in everything.items()}
    k, v = layer.keys_values(everything)
    gone_at: Tensor | None = None
    lost: Tensor | None = None

    def evict(rows: Tensor | None) -> Tensor | None:
        nonlocal gone_at, lost
        # alone at the start, a token stays: nothing to look at, and the step compiles
        if length == 1 or (rule.threshold is None and cache.seen + length <= (rule.budget or 0)):
            return None
        if policy.selective:
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

    scale = layer.config.qk_dim**-0.5
    out, state = layer.score.attend_pruned(
        q, k, v, x=x, state=state, positions=positions, scale=scale, evict=evict
    )
    check_one_selector(state)
    alive = positions >= 0
    if gone_at is not None:
        alive &= gone_at == length
    cache.pack(memory, newest, state, alive)
    if lost is not None and gone_at is not None:
        cache.forget(gone_at < length, lost)
        cache.reach(layer.logit_sizes(q, k, real, positions >= 0))
    return out


def check_one_selector(state: dict[str, Tensor]) -> None:
    """Raise for state of several selection heads: a slot is free only if all heads let its token go."""
    for name, value in state.items():
        if value.shape[1] != 1:
            raise ValueError(
                f"a cache that evicts needs one selection head (R = 1), the score's {name!r} has {value.shape[1]}; "
                f"use a cache without a budget"
            )

"""Attention over an evicting cache: evict, attend, vote, for one token or for many at once."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heedful.attention.cache import token_axis
from heedful.attention.eviction.cache import EvictingCache, real_tokens

if TYPE_CHECKING:
    from heedful.attention.base import Attention


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
    if length > 1 and not cache.policy.needs_weights:
        return _many(layer, x, q, memory, real, cache)
    outputs = []
    for t in range(length):
        now = {n: v.narrow(token_axis(v), t, 1) for n, v in memory.items()}
        part = slice(t, t + 1)
        if not cache.filled:  # without state of ours, the score shows what state it keeps
            outputs.append(_many(layer, x[:, part], q[:, :, part], now, real[:, part], cache))
        elif not cache.ragged and cache.rule.evict_every == 1 and cache.rule.threshold is None:
            outputs.append(_next(layer, x[:, part], q[:, :, part], now, cache))
        else:
            outputs.append(_one(layer, x[:, part], q[:, :, part], now, real[:, part], cache))
    return outputs[0] if length == 1 else torch.cat(outputs, dim=2)


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
    return layer.score.attend_slots(q, k, v, x=x, state=state, positions=positions, newest=slot, scale=scale)


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


def _many(
    layer: "Attention",
    x: Tensor,
    q: Tensor,
    memory: dict[str, Tensor],
    real: Tensor,
    cache: EvictingCache,
) -> Tensor:
    """Several tokens at once: who is evicted when follows from the votes alone, so one masked pass will do."""
    length = real.shape[1]
    newest = cache.positions_of(real)
    policy, rule, fresh = cache.policy, cache.rule, cache.policy.start(newest)
    held = 0
    positions, scores, state, everything = newest, fresh, {}, memory
    if cache.filled:
        old, held = cache.held(), cache.n_slots
        everything = {n: torch.cat((old[n], t), dim=token_axis(t)) for n, t in memory.items()}
        positions = torch.cat((cache.positions, newest), dim=1)
        state = cache.state
        if not policy.selective:
            scores = torch.cat((cache.scores, fresh), dim=1)
    k, v = layer.keys_values(everything)
    column = torch.arange(held + length, device=x.device)
    arrived = column <= column[held:, None]
    visible = arrived & (positions >= 0)[:, None] & real[:, :, None]
    voted = visible & (positions > 0)[:, None] & (positions[:, None] != newest[:, :, None])
    scale = layer.config.qk_dim**-0.5
    alive = positions >= 0
    certified = None
    if rule.threshold is not None or cache.seen + length > (rule.budget or 0):
        rows = layer.score.soft_mask_rows(q, k, state, voted, scale) if policy.selective else None
        alive = alive & (column < held)
        kept, gone = [], []
        for t in range(length):
            now = newest[:, t : t + 1]
            before = alive.clone()
            before[:, held + t] = real[:, t]
            rated = policy.priority(scores if rows is None else rows[:, t], positions, now, rule.budget or 0)
            alive = rule.evict(before, rated, positions, now)
            kept.append(alive)
            gone.append(before & ~alive)
        visible = visible & torch.stack(kept, dim=1)
        if rule.threshold is not None:
            assert rows is not None
            sizes = layer.logit_sizes(q, k, real, positions >= 0)
            certified = torch.stack(gone, dim=1).flatten(1), rows.flatten(1), sizes
    out, state = layer.score.attend(q, k, v, x=x, state=state, visible=visible, voted=voted, scale=scale)
    check_one_selector(state)
    cache.pack(memory, newest, state, alive)
    if certified is not None:
        cache.forget(*certified[:2])
        cache.reach(certified[2])
    return out


def check_one_selector(state: dict[str, Tensor]) -> None:
    """Raise for state of several selection heads: a slot is free only if all heads let its token go."""
    for name, value in state.items():
        if value.shape[1] != 1:
            raise ValueError(
                f"a cache that evicts needs one selection head (R = 1), the score's {name!r} has {value.shape[1]}; "
                f"use a cache without a budget"
            )

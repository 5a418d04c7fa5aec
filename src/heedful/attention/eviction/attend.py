"""Attention over an evicting cache: evict, attend, vote, for one token or for many at once."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heedful.attention.cache import token_axis
from heedful.attention.eviction.cache import EvictingCache
from heedful.attention.eviction.rule import evict

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
        ValueError: if the policy does not go with the score.
        RuntimeError: while gradients are on: training never evicts.
    """
    if torch.is_grad_enabled() and q.requires_grad:
        raise RuntimeError("a cache that evicts cannot be trained through; use torch.no_grad() or no budget")
    selects = "soft_mask" in layer.score.state_names
    if cache.policy.selective and not selects:
        raise ValueError(
            f"the eviction policy 'selective' needs score 'selective', this layer has "
            f"{layer.config.score_config.form!r}; use another policy, e.g. 'streaming'"
        )
    batch, length = x.shape[:2]
    real = cache.real_tokens(key_mask, batch, length, x.device)
    if length == 1:
        return _one(layer, x, q, memory, real, cache)
    if not cache.policy.needs_weights:
        return _many(layer, x, q, memory, real, cache)
    outputs = []
    for t in range(length):
        now = {n: v.narrow(token_axis(v), t, 1) for n, v in memory.items()}
        part = slice(t, t + 1)
        outputs.append(_one(layer, x[:, part], q[:, :, part], now, real[:, part], cache))
    return torch.cat(outputs, dim=2)


def _one(
    layer: "Attention",
    x: Tensor,
    q: Tensor,
    memory: dict[str, Tensor],
    real: Tensor,
    cache: EvictingCache,
) -> Tensor:
    """One token per row: everything in place."""
    newest = cache.next_positions(real)
    cache.put_one(memory, newest, layer.score.state_names)
    k, v = layer.keys_values(cache.held())
    positions = cache.positions
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
    newest = cache.next_positions(real)
    policy, fresh = cache.policy, cache.policy.start(newest)
    held = 0
    positions, scores, state = newest, None if policy.selective else fresh, {}
    if cache.filled:
        held = cache.n_slots
        old = cache.held()
        memory = {n: torch.cat((old[n], t), dim=token_axis(t)) for n, t in memory.items()}
        positions = torch.cat((cache.positions, newest), dim=1)
        scores = None if policy.selective else torch.cat((cache.scores, fresh), dim=1)
        state = cache.state
    k, v = layer.keys_values(memory)
    column = torch.arange(held + length, device=x.device)
    arrived = column <= column[held:, None]
    visible = arrived & (positions >= 0)[:, None] & real[:, :, None]
    voted = visible & (positions > 0)[:, None] & (positions[:, None] != newest[:, :, None])
    scale = layer.config.qk_dim**-0.5
    alive = (positions >= 0) & (column < held)
    if cache.seen + length <= cache.budget:
        alive = positions >= 0
    else:
        rows = layer.score.soft_mask_rows(q, k, state, voted, scale) if policy.selective else None
        kept = []
        for t in range(length):
            now = newest[:, t : t + 1]
            alive = alive.clone()
            alive[:, held + t] = real[:, t]
            rated = rows[:, t] if rows is not None else scores
            assert rated is not None
            due = real[:, t] & (now[:, 0] % cache.evict_every == 0)
            priority = policy.priority(rated, positions, now, cache.budget)
            alive = evict(alive, priority, positions, now, cache.budget, cache.evict_every, due)
            kept.append(alive)
        visible = visible & torch.stack(kept, dim=1)
    out, state = layer.score.attend(q, k, v, x=x, state=state, visible=visible, voted=voted, scale=scale)
    cache.pack(memory, positions, scores, state, alive, length)
    return out

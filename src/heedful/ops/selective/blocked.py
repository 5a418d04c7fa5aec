"""Selective attention over tiles of the (T, S) plane, for any device: extra memory grows with T, not T squared.

For each block of queries the keys up to it are taken in tiles. The logits of the selection heads give the votes
of the tile; F is the running sum up to the block plus an exclusive scan inside it; every head subtracts F from
its logits. Kept for the backward pass are q, k, v, the output, the logarithm of each row's sum, and F before
each block, (B, R, T / block, S). The backward pass walks the blocks in reverse, recomputes their logits, and
carries the sum of the later gradients of F, which is what a vote's gradient consists of; a selection head that
is also an attention head comes last, when that gradient is known.

Where no logit can be large (`Limits.bounded`) the softmax needs no maximum: every weight is exp(L - F), and the
rows are divided by their sums at the end.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from heedful.ops.precision import wide_dtype
from heedful.ops.selective.autograd import differentiate
from heedful.ops.selective.limits import Limits, few
from heedful.ops.selective.tiles import Tile, Tiles, add_product, blocks_of, exclusive_sum


class Needed(NamedTuple):
    """The keys of a block of queries, in order."""

    keys: Tensor
    """Indices of those that weigh something, the block's own at the end."""
    others: Tensor
    """Indices of the earlier keys that do not."""


def _needed(limits: Limits, job: Tiles, rows: slice, soft_mask: Tensor) -> Needed | None:
    """Which keys a block of queries needs, given F before it (B, R, S); None = all of them.

    F never decreases along the queries: what weighs nothing before the block weighs nothing in it.
    """
    earlier = job.n_keys - job.length + rows.start
    if not job.selectors or not earlier or job.small(rows):
        return None
    others = soft_mask[0, :, :earlier].amin(0) >= limits.largest_mask
    if job.key_mask is not None:
        others |= ~job.key_mask[0, :earlier]
    if job.first is None:  # key 0 is not voted on; without it another key would stand in its place
        others[0] = False
    if not few(earlier - int(others.sum()), earlier):
        return None
    own = torch.arange(earlier, earlier + rows.stop - rows.start, device=others.device)
    return Needed(torch.cat((torch.nonzero(~others)[:, 0], own)), torch.nonzero(others)[:, 0])


def selective_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: tuple[Tensor, Tensor, float] | None,
    soft_mask: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Same result as `selective_reference`, for checked tensors; shapes as in `selective_attention`."""
    select_q, select_k, select_scale = select or (None, None, scale)
    out, after, *_ = _forward(
        q, k, v, select_q, select_k, soft_mask, key_mask, segment_ids, scale, select_scale, True
    )
    return out.to(v.dtype), after


def plain_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention over the same tiles: what selection costs is measured against it.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D), the last T keys belong to the queries.
        v: (B, G, S, E); E and D may differ.
        scale: multiplies the logits.
        key_mask: (B, S) bool, False = padding.
        segment_ids: (B, S) integers.

    Returns:
        (B, H, T, E) in the dtype of v.
    """
    return _forward(q, k, v, None, None, None, key_mask, segment_ids, scale, scale, False)[0].to(v.dtype)


@torch.library.custom_op("heedful::selective_blocked", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor | None,
    select_k: Tensor | None,
    soft_mask: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    select_scale: float,
    selects: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend.

    Returns:
        Output (B, H, T, E) in the precision of the sums; F after the last query (B, R, S) and before each
        block (B, R, T / block, S); the logarithm of each row's sum of weights (B, H, T, 1).
    """
    every = Tiles.of(q, k, v, select_q, select_k, key_mask, segment_ids, scale, select_scale, selects)
    out = every.q.new_empty(*every.q.shape[:3], every.v.shape[-1])
    after = every.q.new_zeros(every.batch, every.selectors, every.n_keys)
    if soft_mask is not None:
        after[..., : soft_mask.shape[-1]] = soft_mask
    limits = Limits.of(every.q, every.k, after)
    before = after.new_empty(every.batch, every.selectors, blocks_of(every.length), every.n_keys)
    log_sum = after.new_empty(*every.q.shape[:3], 1)
    for part, job in every.parts():
        carry = after[part]
        for number, tiles in enumerate(job.blocks()):
            before[part, :, number] = carry
            rows = tiles[0].rows
            acc = job.scratch("out", job.batch, job.heads, tiles[0].n, v.shape[-1])
            needed = _needed(limits, job, rows, carry)
            if needed is None:
                total, largest = _attend_block(job, limits, tiles, carry, acc)
            else:
                fewer, held = job.with_keys(rows, needed.keys), carry[..., needed.keys]
                total, largest = _attend_block(fewer, limits, fewer.blocks()[0], held, acc)
                carry[..., needed.keys] = held
                _vote_on(job, rows, needed.others, carry)
            if key_mask is not None:  # a padded query sees nothing
                total.masked_fill_(total == 0, 1.0)
            out[part, :, rows] = acc.div_(total)
            log_sum[part, :, rows] = total.log_().add_(largest)
    return out, after, before, log_sum


def _size(*gradients: Tensor | None) -> float:
    """The power of two next to the largest of all values; 1 where there is none or it is not finite."""
    largest = max((float(g.abs().amax()) for g in gradients if g is not None and g.numel()), default=0.0)
    if not 0 < largest < math.inf:
        return 1.0
    return math.ldexp(1.0, min(max(math.frexp(largest)[1], -120), 120))


def _attend_block(
    job: Tiles, limits: Limits, tiles: list[Tile], carry: Tensor, acc: Tensor
) -> tuple[Tensor, Tensor]:
    """One block of queries: the weighted values in `acc` (B, H, n, E), the votes added to `carry` (B, R, S).

    Returns:
        The sums of the weights and what their logits were reduced by, both (B, H, n, 1).
    """
    units, (keys, values) = job.units(tiles), job.planes
    total = carry.new_zeros(*acc.shape[:3], 1)
    largest = torch.full_like(total, 0.0 if limits.bounded else torch.finfo(total.dtype).min / 2)
    everything = [
        (
            unit.flat(job.q[:, heads, tiles[0].rows]),
            unit.flat(acc[:, heads]),
            total[:, heads],
            largest[:, heads],
        )
        for unit in units
        for heads in [unit.heads]
    ]
    for tile in tiles:
        masks, skipped = None, tile.start - tiles[0].start
        for unit, own in zip(units, everything, strict=True):
            q, into, sums, peaks = own if not skipped else (x[..., skipped:, :] for x in own)
            flat = job.product("logits", q, keys[unit.planes, tile.keys])
            weights = flat.view(unit.batch, -1, tile.n, tile.width)
            if job.selectors and masks is None:
                votes = job.votes(tile, weights[:, :1] if job.select_q is None else job.select_logits(tile))
                masks = job.soft_masks(votes, carry, tile)
                after = torch.add(masks[:, :, -1], votes[:, :, -1])
                carry[..., tile.keys] = after
                limits.cut_off(masks, after)
            if masks is not None:
                weights.sub_(job.heard(masks, unit.heads))
            if not limits.bounded:
                job.block_out(tile, weights)
                peak = torch.maximum(peaks, weights.amax(-1, keepdim=True))
                shrink = (peaks - peak).clamp_(min=-limits.margin).exp_()
                weights.sub_(peak).clamp_(min=-limits.margin)
                peaks.copy_(peak)
                sums.mul_(shrink)
                if tile.left:
                    into.mul_(unit.flat(shrink))
            weights.exp_()
            job.hide(tile, weights)
            sums.add_(weights.sum(-1, keepdim=True))
            add_product(into, flat, values[unit.planes, tile.keys], fresh=tile.left == 0)
    return total, largest


def _vote_on(job: Tiles, rows: slice, others: Tensor, carry: Tensor) -> None:
    """Add the votes of a block on keys that nobody attends to any more: F stays what the formula says."""
    earlier = job.n_keys - job.length
    own = torch.arange(earlier + rows.start, earlier + rows.stop, device=carry.device)
    if job.first is None:  # the first key is not voted on: let it be the real one
        others = torch.cat((others.new_zeros(1), others))
    fewer = job.with_keys(rows, torch.cat((others, own)))
    sums, keys = carry[..., others], fewer.k[0, 0]
    for tile in fewer.strips(len(others)):
        if fewer.select_q is None:
            logits = fewer.product("logits", fewer.q[0, 0], keys[tile.keys])[None, None]
        else:
            logits = fewer.select_logits(tile)
        sums[..., tile.keys] += fewer.votes(tile, logits).sum(2)
    carry[..., others] = sums


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor | None,
    select_k: Tensor | None,
    soft_mask: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    select_scale: float,
    selects: bool,
) -> tuple[Tensor, ...]:
    batch, heads, length, _ = q.shape
    selectors = 0 if not selects else 1 if select_q is None else select_q.shape[1]
    dtype, n_keys = wide_dtype(q), k.shape[2]
    blocks = blocks_of(length)
    return (
        v.new_empty(batch, heads, length, v.shape[-1], dtype=dtype),
        q.new_empty(batch, selectors, n_keys, dtype=dtype),
        q.new_empty(batch, selectors, blocks, n_keys, dtype=dtype),
        q.new_empty(batch, heads, length, 1, dtype=dtype),
    )


@torch.library.custom_op("heedful::selective_blocked_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor | None,
    select_k: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    out: Tensor,
    before: Tensor,
    log_sum: Tensor,
    grad_out: Tensor | None,
    grad_after: Tensor | None,
    scale: float,
    select_scale: float,
    selects: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, select_q, select_k (empty without selection heads), and F before the first query."""
    every = Tiles.of(q, k, v, select_q, select_k, key_mask, segment_ids, scale, select_scale, selects)
    limits = Limits.of(every.q, every.k, before[:, :, :1])
    d_out = torch.zeros_like(out) if grad_out is None else grad_out
    unit = _size(d_out, grad_after)  # gradients are worked out at a size of about 1
    d_out = d_out / unit
    delta = (d_out * out).sum(-1, keepdim=True)  # (B, H, T, 1)
    if limits.bounded:  # divide here, where it is cheap, instead of the weights
        factor = log_sum.neg().exp_()
        d_out, delta = d_out * factor, delta * factor
    if key_mask is not None:
        d_out = d_out.masked_fill(~key_mask[:, None, every.n_keys - every.length :, None], 0.0)
    d_out = d_out.contiguous()
    gradients = Gradients.zeros(every)
    # Gradient of F with the opposite sign, summed over later queries; what follows the last one is grad_after.
    if grad_after is not None:
        gradients.later.sub_(grad_after, alpha=1 / unit)
    for part, job in every.parts():
        for number, tiles in reversed(list(enumerate(job.blocks()))):
            rows, mine = tiles[0].rows, gradients.of(part)
            held = before[part, :, number]
            given = log_sum[part, :, rows], d_out[part, :, rows], delta[part, :, rows]
            # The last F has a gradient in votes on keys that nobody needs, too.
            needed = _needed(limits, job, rows, held) if grad_after is None else None
            if needed is None:
                _differentiate_block(job, limits, tiles, held, *given, mine)
                continue
            fewer = job.with_keys(rows, needed.keys)
            some = mine.with_keys(rows, needed.keys)
            _differentiate_block(fewer, limits, fewer.blocks()[0], held[..., needed.keys], *given, some)
            mine.add_keys(some, needed.keys)
    gradients.q.mul_(scale * unit)
    gradients.select_q.mul_(select_scale * unit)
    for gradient in (gradients.k, gradients.v, gradients.select_k, gradients.later):
        gradient.mul_(unit)
    return (
        gradients.q.to(q.dtype),
        gradients.k.to(k.dtype),
        gradients.v.to(v.dtype),
        gradients.select_q.to(q.dtype),
        gradients.select_k.to(k.dtype),
        gradients.later.neg_(),
    )


class Gradients(NamedTuple):
    """What the backward pass adds up; that of F with the opposite sign."""

    q: Tensor
    k: Tensor
    v: Tensor
    select_q: Tensor
    select_k: Tensor
    later: Tensor

    @classmethod
    def zeros(cls, job: Tiles) -> "Gradients":
        none = (job.batch, 0)
        return cls(
            torch.empty_like(job.q),
            torch.zeros_like(job.k),
            torch.zeros_like(job.v),
            job.q.new_zeros(none if job.select_q is None else job.select_q.shape),
            job.q.new_zeros(none if job.select_k is None else job.select_k.shape),
            job.q.new_zeros(job.batch, job.selectors, job.n_keys),
        )

    def of(self, part: slice) -> "Gradients":
        """Those of some rows of the batch."""
        q, k, v, select_q, select_k, later = (x[part] for x in self)
        return Gradients(q, k, v, select_q, select_k, later)

    def with_keys(self, rows: slice, keys: Tensor) -> "Gradients":
        """Those of some queries, in place, and zeros for some keys; of F what there is for those."""
        own = self.select_k.ndim > 2

        def zeros(x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:2], len(keys), x.shape[3])

        return Gradients(
            self.q[:, :, rows],
            zeros(self.k),
            zeros(self.v),
            self.select_q[:, :, rows] if own else self.select_q,
            zeros(self.select_k) if own else self.select_k,
            self.later[..., keys],
        )

    def add_keys(self, some: "Gradients", keys: Tensor) -> None:
        """Add those for some keys; that of F is replaced."""
        self.k.index_add_(2, keys, some.k)
        self.v.index_add_(2, keys, some.v)
        if self.select_k.ndim > 2:
            self.select_k.index_add_(2, keys, some.select_k)
        self.later[..., keys] = some.later


def _differentiate_block(
    job: Tiles,
    limits: Limits,
    tiles: list[Tile],
    before: Tensor,
    log_sum: Tensor,
    d_out: Tensor,
    delta: Tensor,
    gradients: Gradients,
) -> None:
    """Add the gradients of one block of queries, given F before it and what belongs to its queries."""
    rows, units, (keys, values) = tiles[0].rows, job.units(tiles), job.planes
    dk, dv = gradients.k.flatten(0, 1), gradients.v.flatten(0, 1)
    dq = job.scratch("dq", *job.q[:, :, rows].shape)
    everything = [
        (
            *(unit.flat(x[:, unit.heads]) for x in (job.q[:, :, rows], d_out, dq)),
            *(x[:, unit.heads] for x in (delta, log_sum)),
        )
        for unit in units
    ]
    for tile in tiles:
        votes = masks = d_masks = None
        skipped = tile.start - tiles[0].start
        first = job.product("first", everything[0][0][..., skipped:, :], keys[units[0].planes, tile.keys])
        if job.selectors:
            logits = first.view(units[0].batch, -1, tile.n, tile.width)[:, :1]
            votes = job.votes(tile, logits if job.select_q is None else job.select_logits(tile))
            masks = job.soft_masks(votes, before, tile)
            limits.cut_off(masks, masks[:, :, -1])
            d_masks = job.scratch("d_masks", *masks.shape).zero_()
        for unit, own in reversed(list(zip(units, everything, strict=True))):
            q, d, into, deltas, logs = own if not skipped else (x[..., skipped:, :] for x in own)
            place = unit.planes, tile.keys
            k = keys[place]
            flat = first if unit is units[0] else job.product("logits", q, k)
            weights = flat.view(unit.batch, -1, tile.n, tile.width)
            if masks is not None:
                weights.sub_(job.heard(masks, unit.heads))
            if not limits.bounded:
                weights.sub_(logs).clamp_(-limits.margin, limits.margin)
            weights.exp_()
            job.hide(tile, weights)
            add_product(dv[place], flat.mT, d)
            flat = job.product("d_logits", d, values[place])
            d_logits = flat.view(weights.shape).sub_(deltas).mul_(weights)
            if votes is not None and d_masks is not None:
                job.add_heard(d_masks, d_logits, unit.heads)
                if unit is units[0]:
                    _vote_gradient(job, tile, votes, d_masks, d_logits, gradients)
            add_product(into, flat, k, fresh=tile.left == 0)
            add_product(dk[place], flat.mT, q)
    gradients.q[:, :, rows] = dq


def _vote_gradient(
    job: Tiles, tile: Tile, votes: Tensor, d_masks: Tensor, d_logits: Tensor, gradients: Gradients
) -> None:
    """The gradient that reaches the selection heads through F, from minus the gradient of F, d_masks."""
    later = gradients.later[..., tile.keys]
    d_votes = exclusive_sum(d_masks, later, reverse=True, out=job.scratch("masks", *d_masks.shape))
    later.copy_(d_votes[:, :, 0] + d_masks[:, :, 0])
    d_votes.mul_(votes.sign_())
    if job.select_q is None or job.select_k is None:
        d_logits[:, :1] -= d_votes
        return
    gradients.select_q[:, :, tile.rows] -= d_votes @ job.select_k[:, :, tile.keys]
    gradients.select_k[:, :, tile.keys] -= d_votes.transpose(-1, -2) @ job.select_q[:, :, tile.rows]


differentiate(_forward, _backward)

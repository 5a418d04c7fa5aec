"""Selective attention over blocks of queries, for any device: extra memory grows with T, not with T squared.

For each block of queries all keys up to it are taken at once. The logits of the selection heads give the votes
of the block; F is the running sum up to the block plus an exclusive scan inside it; every head subtracts F from
its logits and takes a softmax over whole rows. Kept for the backward pass are q, k, v, the output, and F before
each block, (B, R, T / block, S). The backward pass walks the blocks in reverse, recomputes their logits, and
carries the sum of the later gradients of F, which is what a vote's gradient consists of; a selection head that
is also an attention head comes last, when that gradient is known.
"""

import torch
from torch import Tensor

from heedful.ops.precision import no_autocast, wide_dtype
from heedful.ops.selective.tiles import LOG2_E, Tiles, blocks_of, exclusive_sum, exp2_


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
        q, k, v, select_q, select_k, soft_mask, key_mask, segment_ids, scale, select_scale
    )
    return out, after


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend.

    Returns:
        Output (B, H, T, E); F after the last query (B, R, S) and before each block (B, R, T / block, S); the
        logarithm, base 2, of each row's sum of weights (B, H, T, 1).
    """
    job = Tiles.of(q, k, v, select_q, select_k, key_mask, segment_ids, scale, select_scale)
    out = torch.empty(*job.q.shape[:3], job.v.shape[-1], dtype=v.dtype, device=q.device)
    carry = job.q.new_zeros(job.batch, job.selectors, job.n_keys)
    if soft_mask is not None:
        carry[..., : soft_mask.shape[-1]] = soft_mask
    before = carry.new_empty(job.batch, job.selectors, job.n_blocks, job.n_keys)
    log_sum = carry.new_empty(*job.q.shape[:3], 1)
    for number, block in enumerate(job.blocks()):
        first = job.heads_of(block)[0]
        logits = job.logits(block, *first)
        before[:, :, number] = carry
        votes = job.votes(block, logits[:, :1] if select_q is None else job.select_logits(block))
        masks = exclusive_sum(votes)
        masks += carry[:, :, None, : block.end] * LOG2_E
        carry[..., : block.end] += votes.sum(2).mul_(1 / LOG2_E)
        job.hide(block, masks)
        for heads in job.heads_of(block):
            if heads is not first:
                logits = job.logits(block, *heads)
            part = slice(*heads)
            largest = job.subtract(logits, masks, *heads).amax(-1, keepdim=True)
            weights = exp2_(logits.sub_(largest))
            total = weights.sum(-1, keepdim=True)
            out[:, part, block.rows] = job.times(weights, job.v, block, *heads).div_(total)
            log_sum[:, part, block.rows] = largest.add_(total.log2_())
    if key_mask is not None:
        out.masked_fill_(~key_mask[:, None, job.n_keys - job.length :, None], 0.0)
    return out, carry, before, log_sum


@_forward.register_fake
def _(q, k, v, select_q, select_k, soft_mask, key_mask, segment_ids, scale, select_scale):
    batch, heads, length, _ = q.shape
    selectors = 1 if select_q is None else select_q.shape[1]
    dtype, n_keys = wide_dtype(q), k.shape[2]
    blocks = blocks_of(length)
    return (
        v.new_empty(batch, heads, length, v.shape[-1]),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, select_q, select_k (empty without selection heads), and F before the first query."""
    job = Tiles.of(q, k, v, select_q, select_k, key_mask, segment_ids, scale, select_scale)
    wide = job.q.dtype
    d_out = torch.zeros_like(out, dtype=wide) if grad_out is None else grad_out.to(wide)
    if key_mask is not None:
        d_out = d_out.masked_fill(~key_mask[:, None, job.n_keys - job.length :, None], 0.0)
    delta = (d_out * out.to(wide)).sum(-1, keepdim=True)  # (B, H, T, 1)
    dq, dk, dv = torch.zeros_like(job.q), torch.zeros_like(job.k), torch.zeros_like(job.v)
    own = select_q is not None
    d_select_q = torch.zeros_like(job.select_q) if own else q.new_empty(0)
    d_select_k = torch.zeros_like(job.select_k) if own else q.new_empty(0)
    # Gradient of F with the opposite sign, summed over later queries; what follows the last one is grad_after.
    later = job.q.new_zeros(job.batch, job.selectors, job.n_keys)
    if grad_after is not None:
        later -= grad_after
    for number, block in reversed(list(enumerate(job.blocks()))):
        every = job.heads_of(block)
        first = job.logits(block, *every[0])
        raw = first[:, :1] if not own else job.select_logits(block)
        votes = job.votes(block, raw)
        masks = exclusive_sum(votes)
        masks += before[:, :, number, None, : block.end] * LOG2_E
        job.hide(block, masks)
        total = torch.zeros_like(votes)
        for heads in reversed(every):
            logits = first if heads is every[0] else job.logits(block, *heads)
            part = slice(*heads)
            weights = exp2_(job.subtract(logits, masks, *heads).sub_(log_sum[:, part, block.rows]))
            d = d_out[:, part, block.rows]
            job.add_transposed(dv, weights, d, block, *heads)
            d_logits = job.product(d, job.v, block, *heads)
            d_logits.sub_(delta[:, part, block.rows]).mul_(weights)
            job.add_per_selector(total, d_logits, *heads)
            if heads is every[0]:
                d_votes = exclusive_sum(total, reverse=True)
                d_votes += later[:, :, None, : block.end]
                d_votes.mul_(votes > 0).neg_()
                later[..., : block.end] += total.sum(2)
                if own:
                    d_select_q[:, :, block.rows] = d_votes @ job.select_k[:, :, : block.end] * select_scale
                    d_select_k[:, :, : block.end] += (
                        d_votes.transpose(-1, -2) @ job.select_q[:, :, block.rows]
                    )
                else:
                    d_logits[:, :1] += d_votes
            dq[:, part, block.rows] = job.times(d_logits, job.k, block, *heads)
            job.add_transposed(dk, d_logits, job.q[:, part, block.rows], block, *heads)
    dq *= scale
    for scaled in (dk, d_select_k):  # job.q and job.select_q carry the scale, and more
        scaled *= 1 / LOG2_E
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        d_select_q.to(q.dtype),
        d_select_k.to(k.dtype),
        later.neg_(),
    )


@_backward.register_fake
def _(q, k, v, select_q, select_k, key_mask, segment_ids, out, before, *rest):
    empty = q.new_empty(0)
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
        empty if select_q is None else torch.empty_like(select_q, memory_format=torch.contiguous_format),
        empty if select_k is None else torch.empty_like(select_k, memory_format=torch.contiguous_format),
        before.new_empty(before.shape[0], before.shape[1], before.shape[3]),
    )


def _save(ctx, inputs, output):
    q, k, v, select_q, select_k, soft_mask, key_mask, segment_ids, scale, select_scale = inputs
    out, _, before, log_sum = output
    ctx.save_for_backward(q, k, v, select_q, select_k, key_mask, segment_ids, out, before, log_sum)
    ctx.scales, ctx.held = (scale, select_scale), None if soft_mask is None else soft_mask.shape[-1]
    ctx.mark_non_differentiable(before, log_sum)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, grad_after, *_):
    if grad_out is None and grad_after is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # once: gradient checkpointing recomputes them a single time
    own = saved[3] is not None
    with no_autocast(saved[0].device):
        dq, dk, dv, dsq, dsk, start = _backward(*saved, grad_out, grad_after, *ctx.scales)
    held = None if ctx.held is None else start[..., : ctx.held]
    return dq, dk, dv, dsq if own else None, dsk if own else None, held, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)

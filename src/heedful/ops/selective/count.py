"""How many tokens each query still holds, over blocks of queries: extra memory grows with T."""

import torch
from torch import Tensor

from heedful.ops.precision import no_autocast, wide_dtype
from heedful.ops.selective.tiles import LOG2_E, Block, Tiles, blocks_of, exclusive_sum


def blocked_count(
    select_q: Tensor,
    select_k: Tensor,
    soft_mask: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    tau: float,
    scale: float,
) -> Tensor:
    """`unmasked_count` for checked tensors, (B, R, T)."""
    return _forward(select_q, select_k, soft_mask, key_mask, segment_ids, tau, scale)[0]


@torch.library.custom_op("heedful::unmasked_count", mutates_args=())
def _forward(
    select_q: Tensor,
    select_k: Tensor,
    soft_mask: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    tau: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The counts, and F before each block, (B, R, T / block, S)."""
    job = _tiles(select_q, select_k, key_mask, segment_ids, scale)
    counts = job.q.new_empty(job.batch, job.selectors, job.length)
    carry = job.q.new_zeros(job.batch, job.selectors, job.n_keys)
    if soft_mask is not None:
        carry[..., : soft_mask.shape[-1]] = soft_mask
    before = carry.new_empty(job.batch, job.selectors, job.n_blocks, job.n_keys)
    for number, block in enumerate(job.blocks()):
        before[:, :, number] = carry
        votes = job.votes(block, job.select_logits(block))
        held = _soft_masks(votes, carry, block).mul_(-1 / tau).add_(1).clamp_(min=0)
        counts[:, :, block.rows] = held.mul_(job.visible(block, held)).sum(-1)
        carry[..., : block.end] += votes.sum(2).mul_(1 / LOG2_E)
    return counts, before


@_forward.register_fake
def _(select_q, select_k, soft_mask, key_mask, segment_ids, tau, scale):
    batch, selectors, length, _ = select_q.shape
    dtype = wide_dtype(select_q)
    return (
        select_q.new_empty(batch, selectors, length, dtype=dtype),
        select_q.new_empty(batch, selectors, blocks_of(length), select_k.shape[2], dtype=dtype),
    )


@torch.library.custom_op("heedful::unmasked_count_backward", mutates_args=())
def _backward(
    select_q: Tensor,
    select_k: Tensor,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    before: Tensor,
    gradient: Tensor,
    tau: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the selection queries, their keys, and F before the first query, (B, R, S)."""
    job = _tiles(select_q, select_k, key_mask, segment_ids, scale)
    dq, dk = torch.zeros_like(job.select_q), torch.zeros_like(job.select_k)
    later = job.q.new_zeros(job.batch, job.selectors, job.n_keys)  # opposite sign, summed over later queries
    for number, block in reversed(list(enumerate(job.blocks()))):
        votes = job.votes(block, job.select_logits(block))
        masks = _soft_masks(votes, before[:, :, number], block)
        total = (masks <= tau).to(masks.dtype).mul_(job.visible(block, masks))
        total *= gradient[:, :, block.rows, None] / tau
        d_votes = exclusive_sum(total, reverse=True)
        d_votes += later[:, :, None, : block.end]
        d_votes.mul_(votes > 0).neg_()
        later[..., : block.end] += total.sum(2)
        dq[:, :, block.rows] = d_votes @ job.select_k[:, :, : block.end] * scale
        dk[:, :, : block.end] += d_votes.transpose(-1, -2) @ job.select_q[:, :, block.rows]
    dk *= 1 / LOG2_E
    return dq.to(select_q.dtype), dk.to(select_k.dtype), later.neg_()


@_backward.register_fake
def _(select_q, select_k, key_mask, segment_ids, before, *rest):
    return (
        torch.empty_like(select_q, memory_format=torch.contiguous_format),
        torch.empty_like(select_k, memory_format=torch.contiguous_format),
        before.new_empty(before.shape[0], before.shape[1], before.shape[3]),
    )


def _save(ctx, inputs, output):
    select_q, select_k, soft_mask, key_mask, segment_ids, tau, scale = inputs
    ctx.save_for_backward(select_q, select_k, key_mask, segment_ids, output[1])
    ctx.numbers, ctx.held = (tau, scale), None if soft_mask is None else soft_mask.shape[-1]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, gradient, _):
    with no_autocast(gradient.device):
        dq, dk, start = _backward(*ctx.saved_tensors, gradient, *ctx.numbers)
    return dq, dk, None if ctx.held is None else start[..., : ctx.held], None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _tiles(
    select_q: Tensor, select_k: Tensor, key_mask: Tensor | None, segment_ids: Tensor | None, scale: float
) -> Tiles:
    return Tiles.of(
        select_q, select_k, select_k[..., :0], select_q, select_k, key_mask, segment_ids, scale, scale
    )


def _soft_masks(votes: Tensor, carry: Tensor, block: Block) -> Tensor:
    """F before each query of the block, (B, R, n, end), in natural units."""
    masks = exclusive_sum(votes).mul_(1 / LOG2_E)
    masks += carry[:, :, None, : block.end]
    return masks

"""How many tokens each query still holds, over blocks of queries: extra memory grows with T."""

from typing import Any

import torch
from torch import Tensor

from heedful.ops.precision import no_autocast, wide_dtype
from heedful.ops.selective.tiles import Tiles, blocks_of, exclusive_sum


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
    every = _tiles(select_q, select_k, key_mask, segment_ids, scale)
    counts = every.q.new_zeros(every.batch, every.selectors, every.length)
    carries = every.q.new_zeros(every.batch, every.selectors, every.n_keys)
    if soft_mask is not None:
        carries[..., : soft_mask.shape[-1]] = soft_mask
    before = carries.new_empty(every.batch, every.selectors, blocks_of(every.length), every.n_keys)
    for part, job in every.parts():
        carry = carries[part]
        for number, tiles in enumerate(job.blocks()):
            before[part, :, number] = carry
            for tile in tiles:
                votes = job.votes(tile, job.select_logits(tile))
                held = job.soft_masks(votes, carry, tile).mul_(-1 / tau).add_(1).clamp_(min=0)
                job.hide(tile, held)
                counts[part, :, tile.rows] += held.sum(-1)
                carry[..., tile.keys] += votes.sum(2)
    return counts, before


@_forward.register_fake
def _(
    select_q: Tensor,
    select_k: Tensor,
    soft_mask: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    tau: float,
    scale: float,
) -> tuple[Tensor, ...]:
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
    every = _tiles(select_q, select_k, key_mask, segment_ids, scale)
    dq, dk = every.q.new_zeros(select_q.shape), every.q.new_zeros(select_k.shape)
    later = every.q.new_zeros(every.batch, every.selectors, every.n_keys)  # opposite sign, of later queries
    for part, job in every.parts():
        assert job.select_q is not None and job.select_k is not None
        for number, tiles in reversed(list(enumerate(job.blocks()))):
            for tile in tiles:
                votes = job.votes(tile, job.select_logits(tile))
                masks = job.soft_masks(votes, before[part, :, number], tile)
                total = (masks <= tau).to(masks.dtype)
                total *= gradient[part, :, tile.rows, None] / tau
                job.hide(tile, total)
                d_votes = exclusive_sum(total, later[part, :, tile.keys], reverse=True)
                d_votes.mul_(votes > 0).neg_()
                later[part, :, tile.keys] += total.sum(2)
                dq[part, :, tile.rows] += d_votes @ job.select_k[:, :, tile.keys]
                dk[part, :, tile.keys] += d_votes.transpose(-1, -2) @ job.select_q[:, :, tile.rows]
    dq *= scale
    return dq.to(select_q.dtype), dk.to(select_k.dtype), later.neg_()


@_backward.register_fake
def _(
    select_q: Tensor,
    select_k: Tensor,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    before: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(select_q, memory_format=torch.contiguous_format),
        torch.empty_like(select_k, memory_format=torch.contiguous_format),
        before.new_empty(before.shape[0], before.shape[1], before.shape[3]),
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    select_q, select_k, soft_mask, key_mask, segment_ids, tau, scale = inputs
    ctx.save_for_backward(select_q, select_k, key_mask, segment_ids, output[1])
    ctx.numbers, ctx.held = (tau, scale), None if soft_mask is None else soft_mask.shape[-1]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
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

"""Selective attention over blocks of queries, for any device: extra memory grows with T, not with T squared.

For each block of queries all keys up to it are taken at once. The logits of the selection heads give the votes
of the block; F is the running sum up to the block plus an exclusive scan inside it; every head subtracts F from
its logits and takes a softmax over whole rows. Kept for the backward pass are q, k, v, the output, and F before
each block, (B, R, T / block, S). The backward pass walks the blocks in reverse, recomputes their logits, and
carries the sum of the later gradients of F, which is what a vote's gradient consists of; a selection head that
is also an attention head comes last, when that gradient is known.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.ops.masks import rank_in_segment
from heedful.ops.precision import no_autocast, wide_dtype

BLOCK = 128
LOG2_E = math.log2(math.e)  # tiles of logits, votes and F are in base 2: 2^x is faster than e^x
TILE = 2**18  # values of one tile of logits: 1 MB of float32 stay in the cache of a core


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
    job = _Job.of(q, k, v, select_q, select_k, key_mask, segment_ids, scale, select_scale)
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
        masks = _exclusive_sum(votes)
        masks += carry[:, :, None, : block.end] * LOG2_E
        carry[..., : block.end] += votes.sum(2).mul_(1 / LOG2_E)
        job.hide(block, masks)
        for heads in job.heads_of(block):
            if heads is not first:
                logits = job.logits(block, *heads)
            part = slice(*heads)
            largest = job.subtract(logits, masks, *heads).amax(-1, keepdim=True)
            weights = _exp2(logits.sub_(largest))
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
    blocks = -(-length // BLOCK)
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
    job = _Job.of(q, k, v, select_q, select_k, key_mask, segment_ids, scale, select_scale)
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
        masks = _exclusive_sum(votes)
        masks += before[:, :, number, None, : block.end] * LOG2_E
        job.hide(block, masks)
        total = torch.zeros_like(votes)
        for heads in reversed(every):
            logits = first if heads is every[0] else job.logits(block, *heads)
            part = slice(*heads)
            weights = _exp2(job.subtract(logits, masks, *heads).sub_(log_sum[:, part, block.rows]))
            d = d_out[:, part, block.rows]
            job.add_transposed(dv, weights, d, block, *heads)
            d_logits = job.product(d, job.v, block, *heads)
            d_logits.sub_(delta[:, part, block.rows]).mul_(weights)
            job.add_per_selector(total, d_logits, *heads)
            if heads is every[0]:
                d_votes = _exclusive_sum(total, reverse=True)
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


@dataclass(frozen=True)
class _Block:
    """Queries start:stop, and the keys up to `end` that they may see."""

    start: int
    stop: int
    end: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class _Job:
    """The inputs in the precision of the sums, queries scaled to logits in base 2, and how they are cut."""

    q: Tensor  # (B, H, T, D), scaled
    k: Tensor  # (B, G, S, D)
    v: Tensor  # (B, G, S, E)
    select_q: Tensor  # (B, R, T, D'), scaled
    select_k: Tensor  # (B, R, S, D')
    selectors: int
    key_mask: Tensor | None
    segment_ids: Tensor | None
    first: Tensor | None  # (1 or B, S) bool, the first real token of each segment; None: it is key 0

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        select_q: Tensor | None,
        select_k: Tensor | None,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        scale: float,
        select_scale: float,
    ) -> "_Job":
        dtype, first = wide_dtype(q), None
        if key_mask is not None or segment_ids is not None:
            first = rank_in_segment(k.shape[2], key_mask, segment_ids, q.device) == 0
        wide_q, wide_k = q.to(dtype) * (scale * LOG2_E), k.to(dtype).contiguous()
        return cls(
            wide_q,
            wide_k,
            v.to(dtype).contiguous(),
            wide_q[:, :1] if select_q is None else select_q.to(dtype) * (select_scale * LOG2_E),
            wide_k[:, :1] if select_k is None else select_k.to(dtype),
            1 if select_q is None else select_q.shape[1],
            key_mask,
            segment_ids,
            first,
        )

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def length(self) -> int:
        return self.q.shape[2]

    @property
    def n_keys(self) -> int:
        return self.k.shape[2]

    @property
    def n_blocks(self) -> int:
        return -(-self.length // BLOCK)

    def blocks(self) -> list[_Block]:
        """All blocks of queries, in order."""
        earlier = self.n_keys - self.length
        starts = range(0, self.length, BLOCK)
        stops = [min(start + BLOCK, self.length) for start in starts]
        return [_Block(start, stop, earlier + stop) for start, stop in zip(starts, stops, strict=True)]

    def heads_of(self, block: _Block) -> list[tuple[int, int]]:
        """Heads (from, to) that are taken at once: whole groups, or parts of one, as many as fill a tile."""
        heads, groups = self.q.shape[1], self.k.shape[1]
        fit = max(1, TILE // max(1, self.batch * (block.stop - block.start) * block.end))
        shared = heads // groups
        step = shared * max(1, fit // shared) if fit >= shared else 1
        return [(at, min(at + step, heads)) for at in range(0, heads, step)]

    def logits(self, block: _Block, start: int, stop: int) -> Tensor:
        """Scaled logits of some heads, (B, h, n, end)."""
        return self.product(self.q[:, start:stop, block.rows], self.k, block, start, stop)

    def select_logits(self, block: _Block) -> Tensor:
        """Scaled logits of the selection heads, (B, R, n, end)."""
        return self.select_q[:, :, block.rows] @ self.select_k[:, :, : block.end].transpose(-1, -2)

    def product(self, x: Tensor, keys: Tensor, block: _Block, start: int, stop: int) -> Tensor:
        """X (B, h, n, D) times the transposed keys (B, G, S, D) of its heads: (B, h, n, end)."""
        own = self._own(keys, start, stop)[:, :, : block.end]
        return self._ungrouped(self._grouped(x, own) @ own.transpose(-1, -2), x)

    def times(self, weights: Tensor, values: Tensor, block: _Block, start: int, stop: int) -> Tensor:
        """Weights (B, h, n, end) times the values (B, G, S, E) of their heads: (B, h, n, E)."""
        own = self._own(values, start, stop)[:, :, : block.end]
        return self._ungrouped(self._grouped(weights, own) @ own, weights)

    def add_transposed(
        self, total: Tensor, weights: Tensor, x: Tensor, block: _Block, start: int, stop: int
    ) -> None:
        """Add weights^T x, summed over the heads of each group, to total (B, G, S, ·)."""
        own = self._own(total, start, stop)[:, :, : block.end]
        own += self._grouped(weights, own).transpose(-1, -2) @ self._grouped(x, own)

    def votes(self, block: _Block, logits: Tensor) -> Tensor:
        """S of the selection heads, (B, R, n, end), from their logits."""
        votes = logits.relu()
        diagonal = votes[..., block.end - (block.stop - block.start) :]
        diagonal *= _strictly_lower(diagonal)
        if self.first is None:
            votes[..., 0] = 0
            return votes
        visible = self._visible(block)
        return votes.mul_((visible & ~self.first[:, None, : block.end])[:, None])

    def hide(self, block: _Block, masks: Tensor) -> None:
        """Make F infinite where a key is not visible; rows that see nothing see everything, and are dropped."""
        diagonal = masks[..., block.end - (block.stop - block.start) :]
        diagonal.masked_fill_(~(_strictly_lower(diagonal).bool() | _identity(diagonal)), torch.inf)
        if self.first is not None:
            visible = self._visible(block)
            masks.masked_fill_(~visible[:, None], torch.inf)
            masks.masked_fill_(~visible.any(-1)[:, None, :, None], 0.0)

    def subtract(self, logits: Tensor, masks: Tensor, start: int, stop: int) -> Tensor:
        """Logits - F, in place."""
        if self.selectors == 1:
            return logits.sub_(masks)
        return logits.sub_(masks[:, self._selector(start, stop)])

    def add_per_selector(self, total: Tensor, x: Tensor, start: int, stop: int) -> None:
        """Add x (B, h, n, end), summed over the heads that listen to each selection head, to total (B, R, ...)."""
        if self.selectors == 1:
            total += x.sum(1, keepdim=True)
        else:
            total.index_add_(1, self._selector(start, stop), x)

    def _selector(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.q.device) * self.selectors // self.q.shape[1]

    def _visible(self, block: _Block) -> Tensor:
        """(B, n, end) bool: padding and segments, causality aside."""
        earlier = self.n_keys - self.length
        rows = slice(earlier + block.start, earlier + block.stop)
        visible = torch.ones(1, 1, 1, dtype=torch.bool, device=self.q.device)
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None, : block.end] & self.key_mask[:, rows, None]
        if self.segment_ids is not None:
            same = self.segment_ids[:, rows, None] == self.segment_ids[:, None, : block.end]
            visible = visible & same
        return visible

    def _own(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """The key heads (B, g, S, ·) that the query heads start:stop belong to."""
        shared = self.q.shape[1] // self.k.shape[1]
        return keys[:, start // shared : -(-stop // shared)]

    def _grouped(self, x: Tensor, own: Tensor) -> Tensor:
        """(B, h, n, ·) -> (B, g, h / g * n, ·): heads that share a key head become rows of one product."""
        return x if x.shape[1] == own.shape[1] else x.reshape(x.shape[0], own.shape[1], -1, x.shape[-1])

    def _ungrouped(self, product: Tensor, x: Tensor) -> Tensor:
        return product.view(x.shape[0], x.shape[1], x.shape[2], -1)


def _exp2(logits: Tensor) -> Tensor:
    """2^x in place, 0 where it would not be a normal number: those slow products down a hundred times."""
    smallest = -126.0 if logits.dtype == torch.float32 else -1022.0
    return torch.threshold_(logits, smallest, -torch.inf).exp2_()


def _strictly_lower(like: Tensor) -> Tensor:
    n = like.shape[-1]
    return torch.ones(n, n, dtype=like.dtype, device=like.device).tril_(-1)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=torch.bool, device=like.device)


def _exclusive_sum(x: Tensor, *, reverse: bool = False, part: int = 16) -> Tensor:
    """Sum over the rows before (or after) each row of (B, R, n, S), in two levels of triangular products.

    A cumsum along this axis is some ten times slower on a CPU.
    """
    n = x.shape[2]

    def triangle(size: int) -> Tensor:
        ones = torch.ones(size, size, dtype=x.dtype, device=x.device)
        return ones.triu_(1) if reverse else ones.tril_(-1)

    if n % part or n <= part:
        return triangle(n) @ x
    parts = x.unflatten(2, (n // part, part))  # (B, R, m, part, S)
    base = triangle(n // part) @ parts.sum(3)
    inside = triangle(part) @ parts
    return inside.add_(base[:, :, :, None]).flatten(2, 3)

"""Selective attention by the native operator, as operators that PyTorch can trace and differentiate.

The cut is that of `blocked`: blocks of queries by tiles of keys, F carried from block to block; see cpp/forward.h
and cpp/backward.h. All sums are in float32 (float64 for float64), maxima of the rows run along, and nothing that
comes after a token touches its row. But the longest of all queries and keys say from which F on a key is left out,
so that a later token may change how an earlier output is rounded. The same bits for any number of threads.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.ops.masks import rank_in_segment
from heedful.ops.native.library import Job, address, check_native, library, pool
from heedful.ops.precision import wide_dtype
from heedful.ops.selective import limits
from heedful.ops.selective.autograd import differentiate

BLOCK = 96  # queries of a block; a multiple of 12, the rows of a panel
TILE = 192  # keys of a tile; a multiple of 32, the columns of a panel


def selective_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: tuple[Tensor, Tensor, float] | None,
    soft_mask: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Same result as `selective_reference`, for checked tensors; shapes as in `selective_attention`.

    Raises:
        ValueError: for tensors that are not on the CPU, or where the operator cannot be had.
    """
    check_native(q)
    select_q, select_k, select_scale = select or (None, None, scale)
    out, after, *_ = _forward(
        q, k, v, select_q, select_k, soft_mask, key_mask, segment_ids, scale, select_scale, True
    )
    return out.to(v.dtype), after


def plain_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention by the same operator, as `plain_blocked`; shapes as there."""
    check_native(q)
    return _forward(q, k, v, None, None, None, key_mask, segment_ids, scale, scale, False)[0].to(v.dtype)


@dataclass(frozen=True)
class Operands:
    """The inputs in the precision of the sums, laid out as the library reads them."""

    q: Tensor
    k: Tensor
    v: Tensor
    select_q: Tensor | None
    select_k: Tensor | None
    real: Tensor | None
    segments: Tensor | None
    first: Tensor | None
    selectors: int

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
        selects: bool,
    ) -> "Operands":
        dtype, first = wide_dtype(q), None
        if key_mask is not None or segment_ids is not None:
            first = rank_in_segment(k.shape[2], key_mask, segment_ids, q.device) == 0
            first = first.expand(q.shape[0], -1).contiguous()
        return cls(
            _rows(q.to(dtype)),
            _rows(k.to(dtype)),
            _rows(v.to(dtype)),
            None if select_q is None else select_q.to(dtype).contiguous(),
            None if select_k is None else select_k.to(dtype).contiguous(),
            None if key_mask is None else key_mask.contiguous(),
            None if segment_ids is None else segment_ids.long().contiguous(),
            first,
            0 if not selects else 1 if select_q is None else select_q.shape[1],
        )

    def job(self, scale: float, select_scale: float) -> Job:
        batch, heads, length, size = self.q.shape
        job = Job(
            batch=batch,
            heads=heads,
            groups=self.k.shape[1],
            length=length,
            n_keys=self.k.shape[2],
            size=size,
            v_size=self.v.shape[-1],
            selectors=self.selectors,
            select_size=0 if self.select_q is None else self.select_q.shape[-1],
            block=BLOCK,
            tile=TILE,
            threads=torch.get_num_threads(),
            every_key=limits.MANY == 0,
            scale=scale,
            select_scale=select_scale,
            q=address(self.q),
            k=address(self.k),
            v=address(self.v),
            select_q=address(self.select_q),
            select_k=address(self.select_k),
            real=address(self.real),
            segments=address(self.segments),
            first=address(self.first),
            parallel=pool(),
        )
        job.qs[:], job.ks[:], job.vs[:] = (x.stride()[:3] for x in (self.q, self.k, self.v))
        return job


def _rows(x: Tensor) -> Tensor:
    """With the last axis contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def blocks_of(length: int) -> int:
    """The number of blocks that `length` queries are cut into."""
    return -(-length // BLOCK)


@torch.library.custom_op("heedful::selective_native", mutates_args=(), device_types="cpu")
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
    """`run_forward` of the trusted library."""
    return run_forward(
        library(wide_dtype(q)),
        q,
        k,
        v,
        select_q,
        select_k,
        soft_mask,
        key_mask,
        segment_ids,
        scale,
        select_scale,
        selects,
    )


def run_forward(
    handle: ctypes.CDLL,
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
        block (B, R, T / block, S); the logarithm of each row's sum of weights (B, H, T).
    """
    x = Operands.of(q, k, v, select_q, select_k, key_mask, segment_ids, selects)
    batch, heads, length, _ = q.shape
    n_keys = k.shape[2]
    start = None if soft_mask is None else soft_mask.to(x.q.dtype).contiguous()
    out = x.q.new_empty(batch, heads, length, v.shape[-1])
    log_sum = x.q.new_empty(batch, heads, length)
    before = x.q.new_empty(batch, x.selectors, blocks_of(length), n_keys)
    after = x.q.new_empty(batch, x.selectors, n_keys)
    job = x.job(scale, select_scale)
    job.start, job.out, job.log_sum = address(start), address(out), address(log_sum)
    job.before, job.after = address(before), address(after)
    job.os[:] = out.stride()[:3]
    handle.heedful_forward(ctypes.byref(job))
    return out, after, before, log_sum


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
    return (
        q.new_empty(batch, heads, length, v.shape[-1], dtype=dtype),
        q.new_empty(batch, selectors, n_keys, dtype=dtype),
        q.new_empty(batch, selectors, blocks_of(length), n_keys, dtype=dtype),
        q.new_empty(batch, heads, length, dtype=dtype),
    )


@torch.library.custom_op("heedful::selective_native_backward", mutates_args=(), device_types="cpu")
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
    """`run_backward` of the trusted library."""
    return run_backward(
        library(wide_dtype(q)),
        q,
        k,
        v,
        select_q,
        select_k,
        key_mask,
        segment_ids,
        out,
        before,
        log_sum,
        grad_out,
        grad_after,
        scale,
        select_scale,
        selects,
    )


def run_backward(
    handle: ctypes.CDLL,
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
    x = Operands.of(q, k, v, select_q, select_k, key_mask, segment_ids, selects)
    d_out = torch.zeros_like(out) if grad_out is None else _rows(grad_out.to(out.dtype))
    d_after = None if grad_after is None else grad_after.contiguous()
    none = x.q.new_empty(q.shape[0], 0)
    dq, dk, dv = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x.q, x.k, x.v))
    dsq = none if x.select_q is None else torch.empty_like(x.select_q)
    dsk = none.clone() if x.select_k is None else torch.empty_like(x.select_k)
    start = x.q.new_empty(q.shape[0], x.selectors, k.shape[2])
    job = x.job(scale, select_scale)
    job.out, job.log_sum, job.before = address(out), address(log_sum), address(before)
    job.os[:] = out.stride()[:3]
    job.grad_out, job.grad_after = address(d_out), address(d_after)
    job.gs[:] = d_out.stride()[:3]
    job.dq, job.dk, job.dv, job.d_start = address(dq), address(dk), address(dv), address(start)
    job.d_select_q, job.d_select_k = address(dsq), address(dsk)
    handle.heedful_backward(ctypes.byref(job))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsq.to(q.dtype), dsk.to(k.dtype), start


differentiate(_forward, _backward)

"""A decoding step over slots by the native operator: `attend_slots` in one call."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from heedful.ops.native.library import SlotsJob, address, library, pool
from heedful.ops.precision import wide_dtype


class RowStore(NamedTuple):
    """The slots of many sequences, a row each; rows may lie any distance apart."""

    k: Tensor
    """(N, G, C, D)."""
    v: Tensor
    """(N, G, C, E)."""
    soft_mask: Tensor
    """(N, C), float32 or wider."""
    positions: Tensor
    """(N, C) int64."""
    next: Tensor
    """(N,) int64, the slot that the next token takes."""
    select_k: Tensor | None = None
    """(N, 1, C, D'), of a selection head of its own."""


@torch.library.custom_op("heedful::attend_slots_native", mutates_args=("soft_mask",), device_types="cpu")
def attend_slots_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor,
    positions: Tensor,
    newest: Tensor,
    scale: float,
    grace: int,
    first: int,
    select_q: Tensor | None,
    select_k: Tensor | None,
    subtract: bool,
) -> tuple[Tensor, Tensor]:
    """`attend_slots` for checked tensors; shapes as there. The votes are added to `soft_mask`."""
    return run_slots(q, k, v, soft_mask, positions, newest, scale, grace, first, select_q, select_k, subtract)


def plain_tensors(*tensors: Tensor) -> bool:
    """Whether nobody looks at what is called: then `run_slots` saves the way through PyTorch's dispatcher.

    Looking are torch.compile, torch.jit.trace, modes such as that of make_fx, and transforms such as vmap; what
    they see has to be the operator, since `run_slots` writes where only it knows.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and all(type(x) is Tensor for x in tensors)
    )


def run_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor,
    positions: Tensor,
    newest: Tensor,
    scale: float,
    grace: int = 1,
    first: int = 1,
    select_q: Tensor | None = None,
    select_k: Tensor | None = None,
    subtract: bool = True,
    handle: ctypes.CDLL | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_slots_native`, by `handle` where it is not verified yet. No gradients."""
    dtype = wide_dtype(q)
    handle = handle or library(dtype)
    batch, heads, _, size = q.shape
    groups, n_keys, v_size = k.shape[1], k.shape[2], v.shape[3]
    wide_q, wide_k, wide_v = _readable(q, dtype), _readable(k, dtype), _readable(v, dtype)
    mask, places, own = soft_mask.contiguous(), positions.contiguous(), newest.contiguous()
    own_q, own_k = (None if x is None else _readable(x, dtype) for x in (select_q, select_k))
    out = wide_q.new_empty(batch, heads, 1, v_size)
    following = newest.new_empty(batch, 1)
    job = SlotsJob(
        batch=batch,
        heads=heads,
        groups=groups,
        n_keys=n_keys,
        size=size,
        v_size=v_size,
        threads=torch.get_num_threads(),
        grace=grace,
        first=first,
        subtract=subtract,
        select_size=0 if own_q is None else own_q.shape[-1],
        select_q=address(own_q),
        select_k=address(own_k),
        scale=scale,
        q=address(wide_q),
        k=address(wide_k),
        v=address(wide_v),
        mask=address(mask),
        positions=address(places),
        newest=address(own),
        ms=mask.stride(0),
        ps=places.stride(0),
        out=address(out),
        next=address(following),
        parallel=pool(),
    )
    job.qs[:], job.ks[:], job.vs[:] = wide_q.stride()[:2], wide_k.stride()[:3], wide_v.stride()[:3]
    if own_q is not None and own_k is not None:
        job.ss[:] = own_q.stride(0), own_k.stride(0), own_k.stride(2)
    handle.heedful_slots(ctypes.byref(job))
    if mask is not soft_mask:
        soft_mask.copy_(mask)
    return out if out.dtype == v.dtype else out.to(v.dtype), following


def run_rows(
    store: "RowStore",
    rows: Tensor,
    seen: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    grace: int,
    first: int,
    select_q: Tensor | None,
    select_k: Tensor | None,
    own_votes: Tensor | None,
    subtract: bool,
) -> Tensor:
    """`step_rows` in one call, for float32 and last strides of 1. No gradients."""
    batch, heads, _, size = q.shape
    groups, slots, v_size = store.k.shape[1], store.k.shape[2], store.v.shape[3]
    out = q.new_empty(batch, heads, 1, v_size)
    rows, seen = rows.contiguous(), seen.contiguous()
    own_votes = None if own_votes is None else own_votes.contiguous()
    job = SlotsJob(
        batch=batch,
        heads=heads,
        groups=groups,
        n_keys=slots,
        size=size,
        v_size=v_size,
        threads=torch.get_num_threads(),
        grace=grace,
        first=first,
        subtract=subtract,
        select_size=0 if select_q is None else select_q.shape[-1],
        select_q=address(select_q),
        select_k=address(store.select_k),
        scale=scale,
        q=address(q),
        k=address(store.k),
        v=address(store.v),
        mask=address(store.soft_mask),
        positions=address(store.positions),
        ms=store.soft_mask.stride(0),
        ps=store.positions.stride(0),
        rows=address(rows),
        seen=address(seen),
        new_k=address(k),
        new_v=address(v),
        new_select_k=address(select_k),
        own_votes=address(own_votes),
        budget=slots,
        ns=store.next.stride(0),
        out=address(out),
        next=address(store.next),
        parallel=pool(),
    )
    job.qs[:], job.ks[:], job.vs[:] = q.stride()[:2], store.k.stride()[:3], store.v.stride()[:3]
    job.nks[:], job.nvs[:] = k.stride()[:2], v.stride()[:2]
    if select_q is not None and select_k is not None and store.select_k is not None:
        job.ss[:] = select_q.stride(0), store.select_k.stride(0), store.select_k.stride(2)
        job.nss = select_k.stride(0)
    library(torch.float32).heedful_slots(ctypes.byref(job))
    return out


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of that type, features side by side; every call of PyTorch that is saved here counts in a decoding step."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


@attend_slots_native.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor,
    positions: Tensor,
    newest: Tensor,
    scale: float,
    grace: int,
    first: int,
    select_q: Tensor | None,
    select_k: Tensor | None,
    subtract: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    return v.new_empty(batch, heads, length, v.shape[-1]), newest.new_empty(batch, 1)

"""Selective attention by Triton kernels, as registered operators: no (T, T) tensor, forward or backward.

Forward: the votes of each block of queries are summed (`sum_votes`) and added up from block to block
(`running_sum`), which gives F before each block; `attend` adds the votes inside its own block by a triangular
product, subtracts F from the logits of one or two heads, and takes the softmax along the keys. Kept for the
backward pass are q, k, v, out, log_sum (B, H, T), and F before each block (B, R, T / block, S).

Backward: `within_blocks` sums the gradients of the logits over the heads that share F and takes from them the part
of the selection gradient that comes from each vote's own block; then the part from later blocks, and one kernel
each for dq and for dk and dv. The selection gradient of half-precision inputs is computed in float32, from F
computed again: see `tilings`.

S, F, the softmax and all sums are float32. Votes inside a block are summed from two bfloat16 parts (16 bits) for
float16 and bfloat16 inputs; for float32, products take three TF32 passes and agree with float32 to about 1e-6.

The gradients of the selection heads are summed by atomics in any order, and may differ in the last bits from run to
run. Everything else is deterministic. With `torch.use_deterministic_algorithms(True)` the backward pass raises.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from heedful.ops.precision import no_autocast
from heedful.ops.selective.triton.arguments import Counts, Heads, Scales, in_heads, in_sixteens
from heedful.ops.selective.triton.available import little_shared_memory, unavailable
from heedful.ops.selective.triton.codes import token_codes
from heedful.ops.selective.triton.tilings import Launch, Tiling, tiling


def selective_triton(
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
        ValueError: if the kernels cannot run these tensors.
    """
    select_q, select_k, select_scale = select or (None, None, scale)
    reason = unavailable(q, v, select_q)
    if reason is not None:
        raise ValueError(f"impl='triton' cannot run here: {reason}")
    code = token_codes(k.shape[2], key_mask, segment_ids)
    size = v.shape[-1]
    if q.dtype != torch.float32:
        q, k, v = (in_sixteens(x) for x in (q, k, v))
        select_q, select_k = (None if x is None else in_sixteens(x) for x in (select_q, select_k))
    out, after, *_ = _forward(q, k, v, select_q, select_k, soft_mask, code, scale, select_scale)
    return out[..., :size], after


@torch.library.custom_op("heedful::selective_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor | None,
    select_k: Tensor | None,
    soft_mask: Tensor | None,
    code: Tensor | None,
    scale: float,
    select_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend.

    Returns:
        Output (B, H, T, E); F after the last query (B, R, S) and before each block (B, R, T / block, S); the
        natural logarithm of each row's sum of weights (B, H, T).
    """
    from heedful.ops.selective.triton.kernels.forward import attend

    job = Job(q, k, v, select_q, select_k, code, scale, select_scale)
    start = job.votes_of_nobody()
    if soft_mask is not None:
        start[..., : soft_mask.shape[-1]] = soft_mask
    out = torch.empty(job.batch, job.heads, job.length, v.shape[-1], dtype=v.dtype, device=v.device)
    log_sum = job.new(job.batch, job.heads, job.length)
    before, after = job.before(start)
    launch = job.tiling.attend
    heads = job.heads_per_program(launch)
    job.run(
        attend,
        launch,
        job.batch * (job.heads // heads) * job.n_blocks,
        *(*job.inputs, before, out, log_sum),
        *(job.counts, job.scales),
        HEADS=heads,
    )
    return out, after, before, log_sum


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor | None,
    select_k: Tensor | None,
    soft_mask: Tensor | None,
    code: Any,
    scale: float,
    select_scale: float,
) -> tuple[Tensor, ...]:
    batch, heads, length, _ = q.shape
    selectors = 1 if select_q is None else select_q.shape[1]
    blocks = -(-length // _tiling(q, v, select_q).block)
    return (
        v.new_empty(batch, heads, length, v.shape[-1]),
        q.new_empty(batch, selectors, k.shape[2], dtype=torch.float32),
        q.new_empty(batch, selectors, blocks, k.shape[2], dtype=torch.float32),
        q.new_empty(batch, heads, length, dtype=torch.float32),
    )


@torch.library.custom_op("heedful::selective_triton_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor | None,
    select_k: Tensor | None,
    code: Tensor | None,
    out: Tensor,
    before: Tensor,
    log_sum: Tensor,
    grad_out: Tensor | None,
    grad_after: Tensor | None,
    scale: float,
    select_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, select_q, select_k (empty without selection heads), and F before the first query."""
    from heedful.ops.selective.triton.kernels import backward

    _check_deterministic()
    job = Job(q, k, v, select_q, select_k, code, scale, select_scale)
    own = select_q is not None
    d_out = torch.zeros_like(out) if grad_out is None else grad_out.to(v.dtype)
    if code is not None:  # padded rows are 0 whatever comes, so that what comes may be NaN
        d_out = d_out.masked_fill((code < 0)[:, None, job.n_keys - job.length :, None], 0.0)
    d_heads = in_heads(d_out)
    delta = torch.empty_like(log_sum)
    job.run(
        backward.dot_out,
        Launch(0),
        job.batch * job.heads * job.n_blocks,
        *(out, d_heads, delta, job.counts),
    )
    inputs = (*job.inputs, before, d_heads, log_sum, delta)
    if job.exact:
        d_select_q, d_select_k, total = _select_gradients(job, before, d_heads, log_sum, delta, grad_after)
    else:
        wide_q, wide_k = (None if x is None else x.float() for x in (select_q, select_k))
        widened = q.float(), k.float(), v.float(), wide_q, wide_k
        exact = Job(*widened, code, scale, select_scale, holds_half=True)
        before32, _ = exact.before(before[:, :, 0].contiguous() if job.n_blocks else exact.votes_of_nobody())
        d_wide = in_heads(d_out.float())
        d_select_q, d_select_k, total = _select_gradients(exact, before32, d_wide, log_sum, delta, grad_after)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch = job.tiling.query
    heads = job.heads_per_program(launch)
    job.run(
        backward.query_gradient,
        launch,
        job.batch * (job.heads // heads) * job.n_blocks,
        *(*inputs, dq, job.counts, job.scales),
        HEADS=heads,
    )
    # Query heads that share a key head but listen to different selection heads are summed afterwards.
    owners = job.groups if job.group_shares_selector else job.heads
    wide = k.dtype if owners == job.groups else torch.float32
    dk = torch.empty(job.batch, owners, job.n_keys, k.shape[-1], dtype=wide, device=k.device)
    dv = torch.empty(job.batch, owners, job.n_keys, v.shape[-1], dtype=wide, device=v.device)
    launch = job.tiling.key
    job.run(
        backward.key_gradient,
        launch,
        job.batch * owners * -(-job.n_keys // launch.keys),
        *(*inputs, dk, dv, owners, job.counts, job.scales),
        ROWS=launch.rows,
    )
    if owners != job.groups:
        dk, dv = (x.unflatten(1, (job.groups, -1)).sum(2).to(like.dtype) for x, like in ((dk, k), (dv, v)))
    empty = q.new_empty(0)
    if not own:
        dq[:, :1] += d_select_q
        dk[:, :1] += d_select_k
    return (
        dq,
        dk,
        dv,
        d_select_q.to(q.dtype) if own else empty,
        d_select_k.to(k.dtype) if own else empty.clone(),
        total.neg_(),
    )


def _select_gradients(
    job: "Job", before: Tensor, d_out: Heads, log_sum: Tensor, delta: Tensor, grad_after: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of select_q (B, R, T, D') and select_k (B, R, S, D'), float32, and minus that of F (B, R, S)."""
    from heedful.ops.selective.triton.kernels import selection

    size = job.select_q.data.shape[-1]
    d_select_q = job.new(job.batch, job.selectors, job.length, size).zero_()
    d_select_k = job.new(job.batch, job.selectors, job.n_keys, size).zero_()
    sums = torch.empty_like(before)
    launch = job.tiling.selection
    spans = job.spans(launch)
    job.run(
        selection.within_blocks,
        launch,
        job.batch * job.selectors * job.n_blocks * spans,
        *(*job.inputs, before, d_out, log_sum, delta),
        *(sums, d_select_q, d_select_k, spans, job.counts, job.scales),
        SPAN=launch.span,
    )
    start = job.votes_of_nobody() if grad_after is None else -grad_after.float()
    later, total = job.running_sum(sums, start.contiguous(), reverse=True)
    for kernel, gradient, tiles in (
        (selection.from_later_blocks_to_queries, d_select_q, job.n_blocks),
        (selection.from_later_blocks_to_keys, d_select_k, -(-job.n_keys // job.tiling.later.keys)),
    ):
        job.run(
            kernel,
            job.tiling.later,
            job.batch * job.selectors * tiles,
            *(job.select_q, job.select_k, job.code, later, gradient, job.counts, job.scales),
        )
    return d_select_q, d_select_k, total


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor | None,
    select_k: Tensor | None,
    code: Any,
    out: Tensor,
    before: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    empty = q.new_empty(0)
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
        empty if select_q is None else torch.empty_like(select_q, memory_format=torch.contiguous_format),
        empty if select_k is None else torch.empty_like(select_k, memory_format=torch.contiguous_format),
        before.new_empty(before.shape[0], before.shape[1], before.shape[3]),
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, select_q, select_k, soft_mask, code, scale, select_scale = inputs
    out, _, before, log_sum = output
    ctx.save_for_backward(q, k, v, select_q, select_k, code, out, before, log_sum)
    ctx.scales = (scale, select_scale)
    ctx.held = None if soft_mask is None else (soft_mask.shape[-1], soft_mask.dtype)
    ctx.mark_non_differentiable(before, log_sum)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad_out: Tensor | None, grad_after: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_after is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: gradient checkpointing recomputes them a single time
    own = saved[3] is not None
    with no_autocast(saved[0].device):
        dq, dk, dv, dsq, dsk, start = _backward(*saved, grad_out, grad_after, *ctx.scales)
    held = None if ctx.held is None else start[..., : ctx.held[0]].to(ctx.held[1])
    return dq, dk, dv, dsq if own else None, dsk if own else None, held, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


class Job:
    """The tensors of one call as the kernels take them, and how they are cut.

    `holds_half`: they are float32 whose values 16 bits hold, which a single TF32 pass multiplies without rounding.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        select_q: Tensor | None,
        select_k: Tensor | None,
        code: Tensor | None,
        scale: float,
        select_scale: float,
        holds_half: bool = False,
    ) -> None:
        self.device = q.device
        self.q, self.k, self.v = in_heads(q), in_heads(k), in_heads(v)
        self.select_q = self.q if select_q is None else in_heads(select_q)
        self.select_k = self.k if select_k is None else in_heads(select_k)
        self.code = q if code is None else code  # not read without codes
        self.batch, self.heads, self.length, size = q.shape
        self.groups, self.n_keys = k.shape[1:3]
        self.selectors = 1 if select_q is None else select_q.shape[1]
        self.tiling = _tiling(q, v, select_q, holds_half)
        self.n_blocks = -(-self.length // self.tiling.block)
        self.counts = Counts(self.length, self.n_keys, self.n_blocks, self.heads, self.groups, self.selectors)
        self.scales = Scales(scale, select_scale)
        self.exact = q.dtype == torch.float32
        self.constants = {
            "SIZE": size,
            "V_SIZE": v.shape[-1],
            "S_SIZE": self.select_q.data.shape[-1],
            "BLOCK": self.tiling.block,
            "CODED": code is not None,
            "PASSES": 0 if not self.exact else 1 if holds_half else 3,
        }

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the kernels read, but for what a forward pass kept."""
        return self.q, self.k, self.v, self.select_q, self.select_k, self.code

    def before(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """F before each block (B, R, T / block, S) and after the last query (B, R, S); start: before the first."""
        from heedful.ops.selective.triton.kernels.prefixes import sum_votes

        sums = self.new(self.batch, self.selectors, self.n_blocks, self.n_keys)
        launch = self.tiling.votes
        spans = self.spans(launch)
        self.run(
            sum_votes,
            launch,
            self.batch * self.selectors * self.n_blocks * spans,
            *(self.select_q, self.select_k, self.code, sums),
            *(self.counts, self.scales, spans),
            SPAN=launch.span,
        )
        return self.running_sum(sums, start, reverse=False)

    @property
    def group_shares_selector(self) -> bool:
        """Whether all query heads of a key head listen to one selection head."""
        return self._share(self.heads // self.groups)

    def heads_per_program(self, launch: Launch) -> int:
        return launch.heads if self.heads % launch.heads == 0 and self._share(launch.heads) else 1

    def _share(self, n: int) -> bool:
        """Whether heads 0 to n - 1, n to 2n - 1 and so on each listen to one selection head."""
        return all(
            at * self.selectors // self.heads == (at + n - 1) * self.selectors // self.heads
            for at in range(0, self.heads, n)
        )

    def new(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def votes_of_nobody(self) -> Tensor:
        """Zeros (B, R, S)."""
        return self.new(self.batch, self.selectors, self.n_keys).zero_()

    def spans(self, launch: Launch) -> int:
        return -(-self.n_keys // (launch.keys * launch.span))

    def run(self, kernel: Any, launch: Launch, programs: int, *args: Any, **constants: Any) -> None:
        """Launch a kernel, with those of the common constants that it takes."""
        common = self.constants | {"KEYS": launch.keys}
        constants |= {name: value for name, value in common.items() if name in kernel.arg_names}
        stages = 1 if little_shared_memory(self.device) else launch.stages
        if programs:
            with torch.cuda.device_of(self.code):
                kernel[(programs,)](*args, **constants, num_warps=launch.warps, num_stages=stages)

    def running_sum(self, sums: Tensor, start: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        from heedful.ops.selective.triton.kernels.prefixes import running_sum

        launch = Launch(keys=64)
        before, after = torch.empty_like(sums), torch.empty_like(start)
        self.run(
            running_sum,
            launch,
            self.batch * self.selectors * -(-self.n_keys // launch.keys),
            *(sums, start, before, after, self.counts),
            STEP=16,
            REVERSE=reverse,
        )
        return before, after


def _tiling(q: Tensor, v: Tensor, select_q: Tensor | None, holds_half: bool = False) -> Tiling:
    sizes = [x.shape[-1] for x in (q, v, select_q) if x is not None]
    return tiling(q.dtype, *sizes, holds_half=holds_half)


def _check_deterministic() -> None:
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "selective_attention with impl='triton' has no deterministic gradient of the selection heads, and "
        "torch.use_deterministic_algorithms(True) asks for one; use impl='sdpa'"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)

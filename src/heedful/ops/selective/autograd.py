"""What the operators that go through blocks of queries have in common: how a backward pass belongs to a forward."""

from typing import Any

from torch import Tensor

from heedful.ops.precision import no_autocast


def differentiate(forward: Any, backward: Any) -> None:
    """Register `backward` as the gradients of `forward`, and what shapes it gives.

    Args:
        forward: a custom operator of q, k, v, select_q, select_k, soft_mask, key_mask, segment_ids and three
            numbers, to out, soft_mask, F before each block, and the logarithms of the sums of the softmax.
        backward: a custom operator of the same without soft_mask and numbers, then out, F before each block, the
            logarithms, the gradients of out and of soft_mask, or None, and the numbers; to the gradients of q, k,
            v, select_q, select_k and of F at the start, (B, R, S).
    """

    def shapes(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        select_q: Tensor | None,
        select_k: Tensor | None,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        out: Tensor,
        before: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        none = (q.shape[0], 0)
        return (
            q.new_empty(q.shape),
            k.new_empty(k.shape),
            v.new_empty(v.shape),
            q.new_empty(none if select_q is None else select_q.shape),
            k.new_empty(none if select_k is None else select_k.shape),
            before.new_empty(before.shape[0], before.shape[1], before.shape[3]),
        )

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, select_q, select_k, soft_mask, key_mask, segment_ids, *numbers = inputs
        out, _, before, log_sum = output
        ctx.save_for_backward(q, k, v, select_q, select_k, key_mask, segment_ids, out, before, log_sum)
        ctx.numbers, ctx.held = numbers, None if soft_mask is None else soft_mask.shape[-1]
        ctx.mark_non_differentiable(before, log_sum)
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, grad_out: Tensor | None, grad_after: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_after is None:
            return (None,) * 11
        saved = ctx.saved_tensors  # once: gradient checkpointing recomputes them a single time
        own = saved[3] is not None
        with no_autocast(saved[0].device):
            dq, dk, dv, dsq, dsk, start = backward(*saved, grad_out, grad_after, *ctx.numbers)
        held = None if ctx.held is None else start[..., : ctx.held]
        return dq, dk, dv, dsq if own else None, dsk if own else None, held, *(None,) * 5

    backward.register_fake(shapes)
    forward.register_autograd(gradients, setup_context=save)

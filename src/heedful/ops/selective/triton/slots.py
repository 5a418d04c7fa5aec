"""A decoding step over slots in one launch."""

import torch
from torch import Tensor

from heedful.ops.selective.triton.arguments import ALIGNED, in_heads, in_slots
from heedful.ops.selective.triton.available import unavailable
from heedful.ops.selective.triton.tilings import decode, padded_size


def attend_slots_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor,
    positions: Tensor,
    newest: Tensor,
    scale: float,
    grace: int = 1,
    first: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with the newest token, cast its votes, and pick the slot that the next token may take.

    The same numbers as `selective_attention` gives for its last query, in any order of the keys. No gradient.

    Args:
        q: (B, H, 1, D).
        k: (B, G, C, D).
        v: (B, G, C, E).
        soft_mask: (B, C) float32, the votes against each slot so far; not changed.
        positions: (B, C) int64, -1 = empty: whatever such a slot holds is not attended to; 0 = the first real
            token, which nobody votes on and which is never evicted.
        newest: (B, 1) int64, the slot of the query's own token, which it does not vote on.
        scale: multiplies the logits.
        grace: the newest tokens that never go, the next one included.
        first: the first tokens that never go.

    Returns:
        out: (B, H, 1, E) in the dtype of v, 0 where all slots are empty.
        soft_mask: (B, C) float32, with the votes of this query.
        next_slot: (B, 1) int64, the first empty slot; where there is none, the slot with the most votes, the
            oldest among equals; 0 where that leaves nothing.

    Raises:
        ValueError: if the kernel cannot run these tensors.
    """
    reason = unavailable(q, v)
    sizes = q.shape[-1], v.shape[-1]
    if reason is None and q.dtype != torch.float32 and any(size % ALIGNED for size in sizes):
        reason = f"in 16 bits it takes head sizes that are multiples of {ALIGNED}, got {sizes}; use impl='products'"
    if reason is not None:
        raise ValueError(f"attend_slots_triton cannot run here: {reason}")
    return _attend_slots(q, k, v, soft_mask, positions, newest, scale, grace, first)


@torch.library.custom_op("heedful::attend_slots_triton", mutates_args=())
def _attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor,
    positions: Tensor,
    newest: Tensor,
    scale: float,
    grace: int,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from heedful.ops.selective.triton.kernels.slots import attend_and_vote

    batch, heads, _, size = q.shape
    groups, n_slots = k.shape[1:3]
    shared, v_size = heads // groups, v.shape[-1]
    out = torch.empty(batch, heads, 1, v_size, dtype=v.dtype, device=v.device)
    new_mask = torch.empty(batch, n_slots, dtype=torch.float32, device=q.device)
    next_slot = torch.empty(batch, 1, dtype=torch.int64, device=q.device)
    launch = decode(q.dtype, size, v_size)
    if batch:
        with torch.cuda.device_of(q):
            attend_and_vote[(batch * groups,)](
                *(in_heads(x) for x in (q, k, v)),
                *(in_slots(x) for x in (soft_mask, positions, newest)),
                *(out, new_mask, next_slot, n_slots, groups, scale, grace, first),
                SHARED=shared,
                ROWS=padded_size(shared),
                SIZE=size,
                V_SIZE=v_size,
                KEYS=launch.keys,
                PASSES=3 if q.dtype == torch.float32 else 0,
                num_warps=launch.warps,
                num_stages=launch.stages,
            )
    return out, new_mask, next_slot


@_attend_slots.register_fake
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
) -> tuple[Tensor, ...]:
    return (
        v.new_empty(*q.shape[:3], v.shape[-1]),
        q.new_empty(soft_mask.shape, dtype=torch.float32),
        q.new_empty(q.shape[0], 1, dtype=torch.int64),
    )

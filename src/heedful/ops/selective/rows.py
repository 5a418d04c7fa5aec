"""A decoding step of many sequences whose slots lie in one store, as a serving engine has them."""

import torch
from torch import Tensor

from heedful.ops.native.library import preferred
from heedful.ops.selective.native.slots import RowStore, plain_tensors, run_rows
from heedful.ops.selective.slots import attend_slots

__all__ = ["RowStore", "step_rows"]


def step_rows(
    store: RowStore,
    rows: Tensor,
    seen: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    grace: int = 1,
    first: int = 1,
    select: tuple[Tensor, Tensor] | None = None,
    own_votes: Tensor | None = None,
    subtract: bool = True,
) -> Tensor:
    """Write a token of each of B sequences into its slot, attend, vote, and name the slot of the next, in place.

    All slots of a row are its budget. The same numbers as `attend_slots` gives for each row alone; in one call on
    the CPU where the C++ operator can be had and all is float32. No gradients.

    Args:
        store: slots of N sequences.
        rows: (B,) int64, which row is whose; all different.
        seen: (B,) int64, tokens that each has had before, one at least.
        q: (B, H, 1, D).
        k: (B, G, D), of the new tokens.
        v: (B, G, E).
        scale: multiplies the logits.
        grace: the newest tokens that never go, the next one included.
        first: the first tokens that never go.
        select: query (B, 1, 1, D') and key (B, D') of a selection head; None: head 0.
        own_votes: (B,), what the votes against the new tokens begin with; None: 0.
        subtract: whether the votes are subtracted from the logits; else they only say who goes.

    Returns:
        (B, H, 1, E) in the dtype of v.
    """
    select_q, select_k = select or (None, None)
    floats = [q, k, v, store.k, store.v, store.soft_mask]
    floats += [x for x in (select_q, select_k, store.select_k, own_votes) if x is not None]
    if (
        preferred(q.device.type, q.dtype)
        and not torch.is_grad_enabled()
        and plain_tensors(*floats)
        and all(x.dtype == torch.float32 for x in floats)
        and all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in floats if x is not own_votes)
    ):
        how = scale, grace, first, select_q, select_k, own_votes, subtract
        return run_rows(store, rows, seen, q, k, v, *how)
    slot, budget = store.next[rows], store.k.shape[2]
    store.k[rows, :, slot], store.v[rows, :, slot] = k, v
    store.soft_mask[rows, slot] = 0.0 if own_votes is None else own_votes.to(store.soft_mask.dtype)
    store.positions[rows, slot] = seen
    if store.select_k is not None and select_k is not None:
        store.select_k[rows, 0, slot] = select_k
    in_use = (seen + 1).clamp(max=budget)
    outs, following = [], []
    for b, (row, n) in enumerate(zip(rows.tolist(), in_use.tolist(), strict=True)):
        own = None
        if select_q is not None and store.select_k is not None:
            own = select_q[b : b + 1], store.select_k[row : row + 1, :, :n]
        out, after = attend_slots(
            q[b : b + 1],
            store.k[row : row + 1, :, :n],
            store.v[row : row + 1, :, :n],
            store.soft_mask[row : row + 1, :n],
            store.positions[row : row + 1, :n],
            slot[b : b + 1, None],
            scale,
            grace=grace,
            first=first,
            select=own,
            subtract=subtract,
        )
        outs.append(out)
        following.append(after[0])
    store.next[rows] = torch.where(in_use < budget, in_use, torch.cat(following))
    return torch.cat(outs)

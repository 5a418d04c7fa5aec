"""One decoding step over unordered slots: attend, vote, and pick the slot that the next token may take."""

import triton
import triton.language as tl

from heedful.ops.selective.triton.kernels.tiles import (
    LOG2_E,
    load_rows,
    load_tile,
    narrow,
    padded,
    plus_product,
    product,
)


@triton.jit
def attend_and_vote(
    q,
    k,
    v,
    soft_mask,
    positions,
    newest,
    out,
    new_mask,
    next_slot,
    n_slots,
    groups,
    scale,
    grace,
    first,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    PASSES: tl.constexpr,
):
    """The query heads of one key head; key head 0, which head 0 reads, also votes and picks."""
    batch = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    head = group * SHARED
    own = tl.load(newest.data + batch * newest.batch)
    youngest = (
        tl.load(positions.data + batch * positions.batch + own) + 1 - grace
    )  # that may go when the next comes
    queries = load_rows(q.data + batch * q.batch + head * q.head, q.head, 0, SHARED, ROWS, SIZE)
    rows = tl.arange(0, ROWS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, padded(V_SIZE)], tl.float32)
    never: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    best = tl.full([], float("-inf"), tl.float32)
    best_age = tl.full([], never, tl.int64)
    best_slot = tl.zeros([], tl.int64)
    for start in range(0, n_slots, KEYS):
        slot = start + tl.arange(0, KEYS).to(tl.int64)
        position = tl.load(positions.data + batch * positions.batch + slot, mask=slot < n_slots, other=-1)
        votes = tl.load(soft_mask.data + batch * soft_mask.batch + slot, mask=slot < n_slots, other=0.0)
        keys = load_tile(k, batch, group, start, n_slots, KEYS, SIZE)
        values = load_tile(v, batch, group, start, n_slots, KEYS, V_SIZE)
        values = tl.where((position >= 0)[:, None], values, 0.0).to(v.data.dtype.element_ty)  # 0 * NaN is NaN
        raw = product(queries, tl.trans(keys), PASSES) * scale
        logits = tl.where((position >= 0)[None, :], raw - votes[None, :], float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2((logits - finite[:, None]) * LOG2_E)
        shrink = tl.exp2((largest - finite) * LOG2_E)
        total = total * shrink + tl.sum(weights, 1)
        sums = plus_product(sums * shrink[:, None], narrow(weights, values.dtype), values, PASSES)
        largest = new
        if group == 0:
            first_head = tl.sum(tl.where((rows == 0)[:, None], raw, 0.0), 0)
            may_vote = (position > 0) & (slot != own) & (first_head > 0.0)
            votes += tl.where(may_vote, first_head, 0.0)
            tl.store(new_mask + batch * n_slots + slot, votes, mask=slot < n_slots)
            empty = (position < 0) & (slot < n_slots)
            may_go = (position >= first) & (position <= youngest)
            priority = tl.where(empty, float("inf"), tl.where(may_go, votes, float("-inf")))
            highest = tl.max(priority, 0)
            ties = (priority == highest) & (empty | may_go)
            age = tl.where(ties, tl.where(empty, slot, position), never)
            oldest = tl.min(age, 0)
            found = tl.min(tl.where(ties & (age == oldest), slot, never), 0)
            better = (oldest < never) & ((highest > best) | ((highest == best) & (oldest < best_age)))
            best = tl.where(better, highest, best)
            best_age = tl.where(better, oldest, best_age)
            best_slot = tl.where(better, found, best_slot)
    if group == 0:
        tl.store(next_slot + batch, best_slot)
    columns = tl.arange(0, padded(V_SIZE))
    sums = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    at = out + (batch * groups * SHARED + head + rows)[:, None] * V_SIZE + columns[None, :]
    inside = (rows < SHARED)[:, None] & (columns < V_SIZE)[None, :]
    tl.store(at, narrow(sums, out.dtype.element_ty), mask=inside)

"""Attention with F subtracted from the logits, for one or two heads that share F."""

import triton
import triton.language as tl

from heedful.ops.selective.triton.kernels.tiles import (
    LOG2_E,
    hide,
    load_codes,
    load_rows,
    narrow,
    plus_product,
    product,
    store_rows,
    sum_before,
    votes_of,
)


@triton.jit
def attend(
    q,
    k,
    v,
    select_q,
    select_k,
    code,
    before,
    out,
    log_sum,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    sq_batch,
    sq_head,
    sq_row,
    sk_batch,
    sk_head,
    sk_row,
    length,
    n_keys,
    n_blocks,
    heads,
    groups,
    selectors,
    scale,
    select_scale,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_PADDED: tl.constexpr,
    S_SIZE: tl.constexpr,
    S_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    CODED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One block of queries of HEADS heads: out (B, H, T, E), and the logarithm of each row's sum of weights."""
    # Later blocks have more keys, so they start first.
    block = n_blocks - 1 - tl.program_id(0) % n_blocks
    pair = tl.program_id(0) // n_blocks
    batch = (pair // (heads // HEADS)).to(tl.int64)
    head = pair % (heads // HEADS) * HEADS
    selector = head * selectors // heads
    group = head // (heads // groups)
    group2 = (head + HEADS - 1) // (heads // groups)
    earlier = n_keys - length
    rows = block * BLOCK + tl.arange(0, BLOCK)
    at = earlier + rows
    code += batch * n_keys
    at_code = load_codes(code, at, n_keys, CODED)
    q += batch * q_batch + head.to(tl.int64) * q_head
    k_base = k + batch * k_batch + group.to(tl.int64) * k_head
    v_base = v + batch * v_batch + group.to(tl.int64) * v_head
    k_base2 = k + batch * k_batch + group2.to(tl.int64) * k_head
    v_base2 = v + batch * v_batch + group2.to(tl.int64) * v_head
    select_q += batch * sq_batch + selector.to(tl.int64) * sq_head
    select_k += batch * sk_batch + selector.to(tl.int64) * sk_head
    before += ((batch * selectors + selector) * n_blocks + block) * n_keys

    queries = load_rows(q, q_row, block * BLOCK, length, BLOCK, SIZE, PADDED)
    queries2 = queries
    if HEADS == 2:
        queries2 = load_rows(q + q_head, q_row, block * BLOCK, length, BLOCK, SIZE, PADDED)
    selecting = load_rows(select_q, sq_row, block * BLOCK, length, BLOCK, S_SIZE, S_PADDED)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, V_PADDED], tl.float32)
    largest2, total2, sums2 = largest, total, sums
    # Keys that come before all queries of the block need no causal mask.
    far = (earlier + block * BLOCK) // KEYS * KEYS
    end = tl.minimum(earlier + (block + 1) * BLOCK, n_keys)
    for NEAR in tl.static_range(2):
        lowest = far if NEAR else 0
        highest = end if NEAR else far
        for start in range(lowest, highest, KEYS):
            key = start + tl.arange(0, KEYS)
            key_code = load_codes(code, key, n_keys, CODED)
            at_, key_ = at[:, None], key[None, :]
            at_code_, key_code_ = at_code[:, None], key_code[None, :]
            selected = load_rows(select_k, sk_row, start, n_keys, KEYS, S_SIZE, S_PADDED)
            votes = product(selecting, tl.trans(selected), EXACT) * select_scale
            votes = votes_of(votes, at_, key_, at_code_, key_code_, CODED, NEAR)
            earlier_votes = tl.load(before + key, mask=key < n_keys, other=0.0)
            soft_mask = sum_before(votes, BLOCK, EXACT) + earlier_votes[None, :]
            soft_mask = hide(-soft_mask, at_, key_, at_code_, key_code_, CODED, NEAR)
            keys = load_rows(k_base, k_row, start, n_keys, KEYS, SIZE, PADDED)
            values = load_rows(v_base, v_row, start, n_keys, KEYS, V_SIZE, V_PADDED)
            logits = product(queries, tl.trans(keys), EXACT) * scale + soft_mask
            largest, total, sums = _add(logits, values, largest, total, sums, EXACT)
            if HEADS == 2:
                keys = load_rows(k_base2, k_row, start, n_keys, KEYS, SIZE, PADDED)
                values = load_rows(v_base2, v_row, start, n_keys, KEYS, V_SIZE, V_PADDED)
                logits = product(queries2, tl.trans(keys), EXACT) * scale + soft_mask
                largest2, total2, sums2 = _add(logits, values, largest2, total2, sums2, EXACT)
    first = (batch * heads + head) * length
    _finish(out, log_sum, first, block, length, largest, total, sums, BLOCK, V_SIZE, V_PADDED)
    if HEADS == 2:
        first += length
        _finish(out, log_sum, first, block, length, largest2, total2, sums2, BLOCK, V_SIZE, V_PADDED)


@triton.jit
def _add(logits, values, largest, total, sums, EXACT: tl.constexpr):
    """One tile more in a softmax that runs along the keys."""
    new = tl.maximum(largest, tl.max(logits, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2((logits - finite[:, None]) * LOG2_E)
    shrink = tl.exp2((largest - finite) * LOG2_E)
    total = total * shrink + tl.sum(weights, 1)
    sums = plus_product(sums * shrink[:, None], narrow(weights, values.dtype), values, EXACT)
    return new, total, sums


@triton.jit
def _finish(
    out,
    log_sum,
    first,
    block,
    length,
    largest,
    total,
    sums,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Rows that saw nothing are 0, and their log_sum is infinite: all weights are 0 in the backward pass."""
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    store_rows(out + first * SIZE, SIZE, block * BLOCK, length, sums / total[:, None], BLOCK, SIZE, PADDED)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    logarithm = tl.where(some, largest + tl.log(total), float("inf"))
    tl.store(log_sum + first + rows, logarithm, mask=rows < length)

"""Attention with F subtracted from the logits, for one or two heads that share F."""

import triton
import triton.language as tl

from heedful.ops.selective.triton.kernels.soft_mask import masked_by, tokens, votes_on
from heedful.ops.selective.triton.kernels.tiles import (
    LOG2_E,
    load_tile,
    narrow,
    padded,
    plus_product,
    product,
    store_rows,
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
    counts,
    scales,
    SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    S_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    CODED: tl.constexpr,
    PASSES: tl.constexpr,
):
    """One block of queries of HEADS heads: out (B, H, T, E), and the logarithm of each row's sum of weights."""
    length, n_keys, n_blocks = counts.length, counts.n_keys, counts.n_blocks
    # Later blocks have more keys, so they start first.
    block = n_blocks - 1 - tl.program_id(0) % n_blocks
    pair = tl.program_id(0) // n_blocks
    batch = (pair // (counts.heads // HEADS)).to(tl.int64)
    head = pair % (counts.heads // HEADS) * HEADS
    selector = head * counts.selectors // counts.heads
    group = head // (counts.heads // counts.groups)
    group2 = (head + HEADS - 1) // (counts.heads // counts.groups)
    earlier = n_keys - length
    code += batch * n_keys
    query = tokens(code, earlier + block * BLOCK + tl.arange(0, BLOCK), n_keys, CODED)
    before += ((batch * counts.selectors + selector) * n_blocks + block) * n_keys

    queries = load_tile(q, batch, head, block * BLOCK, length, BLOCK, SIZE)
    queries2 = queries
    if HEADS == 2:
        queries2 = load_tile(q, batch, head + 1, block * BLOCK, length, BLOCK, SIZE)
    selecting = load_tile(select_q, batch, selector, block * BLOCK, length, BLOCK, S_SIZE)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, padded(V_SIZE)], tl.float32)
    largest2, total2, sums2 = largest, total, sums
    # Keys that come before all queries of the block need no causal mask.
    far = (earlier + block * BLOCK) // KEYS * KEYS
    end = tl.minimum(earlier + (block + 1) * BLOCK, n_keys)
    for NEAR in tl.static_range(2):
        lowest = far if NEAR else 0
        highest = end if NEAR else far
        for start in range(lowest, highest, KEYS):
            at = start + tl.arange(0, KEYS)
            key = tokens(code, at, n_keys, CODED)
            selected = load_tile(select_k, batch, selector, start, n_keys, KEYS, S_SIZE)
            votes = votes_on(selecting, selected, query, key, scales.select, False, CODED, NEAR, PASSES)
            known = tl.load(before + at, mask=at < n_keys, other=0.0)
            mask = masked_by(votes, known, query, key, False, CODED, NEAR, PASSES)
            keys = load_tile(k, batch, group, start, n_keys, KEYS, SIZE)
            values = load_tile(v, batch, group, start, n_keys, KEYS, V_SIZE)
            logits = product(queries, tl.trans(keys), PASSES) * scales.logits + mask
            largest, total, sums = _add(logits, values, largest, total, sums, PASSES)
            if HEADS == 2:
                keys = load_tile(k, batch, group2, start, n_keys, KEYS, SIZE)
                values = load_tile(v, batch, group2, start, n_keys, KEYS, V_SIZE)
                logits = product(queries2, tl.trans(keys), PASSES) * scales.logits + mask
                largest2, total2, sums2 = _add(logits, values, largest2, total2, sums2, PASSES)
    first = (batch * counts.heads + head) * length
    _finish(out, log_sum, first, block, length, largest, total, sums, BLOCK, V_SIZE)
    if HEADS == 2:
        _finish(out, log_sum, first + length, block, length, largest2, total2, sums2, BLOCK, V_SIZE)


@triton.jit
def _add(logits, values, largest, total, sums, PASSES: tl.constexpr):
    """One tile more in a softmax that runs along the keys."""
    new = tl.maximum(largest, tl.max(logits, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2((logits - finite[:, None]) * LOG2_E)
    shrink = tl.exp2((largest - finite) * LOG2_E)
    total = total * shrink + tl.sum(weights, 1)
    sums = plus_product(sums * shrink[:, None], narrow(weights, values.dtype), values, PASSES)
    return new, total, sums


@triton.jit
def _finish(
    out, log_sum, first, block, length, largest, total, sums, BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    """Rows that saw nothing are 0, and their log_sum is infinite: all weights are 0 in the backward pass."""
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    store_rows(out + first * SIZE, SIZE, block * BLOCK, length, sums / total[:, None], BLOCK, SIZE)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    logarithm = tl.where(some, largest + tl.log(total), float("inf"))
    tl.store(log_sum + first + rows, logarithm, mask=rows < length)

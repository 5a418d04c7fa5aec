"""Gradients of q, k and v; those of the selection heads are in `selection.py`.

Tiles of logits are recomputed from the sums that the forward pass kept. A program owns what it writes, so there
are no atomics here.
"""

import triton
import triton.language as tl

from heedful.ops.selective.triton.kernels.soft_mask import masked_by, tokens, votes_on
from heedful.ops.selective.triton.kernels.tiles import (
    LOG2_E,
    load_rows,
    load_tile,
    narrow,
    padded,
    plus_product,
    product,
    store_rows,
)


@triton.jit
def dot_out(out, d_out, delta, counts, V_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """delta (B, H, T): out . d_out of each query."""
    length = counts.length
    block = tl.program_id(0) % counts.n_blocks
    rows = block * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(0) // counts.n_blocks).to(tl.int64)
    x = load_rows(out + row * length * V_SIZE, V_SIZE, block * BLOCK, length, BLOCK, V_SIZE)
    batch, head = row // counts.heads, row % counts.heads
    y = load_tile(d_out, batch, head, block * BLOCK, length, BLOCK, V_SIZE)
    products = x.to(tl.float32) * y.to(tl.float32)
    tl.store(delta + row * length + rows, tl.sum(products, 1), mask=rows < length)


@triton.jit
def query_gradient(
    q,
    k,
    v,
    select_q,
    select_k,
    code,
    before,
    d_out,
    log_sum,
    delta,
    dq,
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
    """dq (B, H, T, D) of one block of queries, for HEADS heads that share F."""
    length, n_keys, n_blocks = counts.length, counts.n_keys, counts.n_blocks
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
    first = (batch * counts.heads + head) * length

    queries = load_tile(q, batch, head, block * BLOCK, length, BLOCK, SIZE)
    d_rows = load_tile(d_out, batch, head, block * BLOCK, length, BLOCK, V_SIZE)
    sums, deltas = load_sums(log_sum + first, delta + first, block * BLOCK, length, BLOCK)
    queries2, d_rows2, sums2, deltas2 = queries, d_rows, sums, deltas
    if HEADS == 2:
        queries2 = load_tile(q, batch, head + 1, block * BLOCK, length, BLOCK, SIZE)
        d_rows2 = load_tile(d_out, batch, head + 1, block * BLOCK, length, BLOCK, V_SIZE)
        second = first + length
        sums2, deltas2 = load_sums(log_sum + second, delta + second, block * BLOCK, length, BLOCK)
    selecting = load_tile(select_q, batch, selector, block * BLOCK, length, BLOCK, S_SIZE)
    gradient = tl.zeros([BLOCK, padded(SIZE)], tl.float32)
    gradient2 = gradient
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
            d_logits = logit_gradient(queries, keys, values, d_rows, sums, deltas, mask, scales, PASSES)
            gradient = plus_product(gradient, narrow(d_logits, keys.dtype), keys, PASSES)
            if HEADS == 2:
                keys = load_tile(k, batch, group2, start, n_keys, KEYS, SIZE)
                values = load_tile(v, batch, group2, start, n_keys, KEYS, V_SIZE)
                d_logits = logit_gradient(
                    queries2, keys, values, d_rows2, sums2, deltas2, mask, scales, PASSES
                )
                gradient2 = plus_product(gradient2, narrow(d_logits, keys.dtype), keys, PASSES)
    gradient *= scales.logits
    store_rows(dq + first * SIZE, SIZE, block * BLOCK, length, gradient, BLOCK, SIZE)
    if HEADS == 2:
        gradient2 *= scales.logits
        store_rows(dq + (first + length) * SIZE, SIZE, block * BLOCK, length, gradient2, BLOCK, SIZE)


@triton.jit
def load_sums(log_sum, delta, first_row, length, ROWS: tl.constexpr):
    """log_sum and delta of some queries; the weights of rows beyond the last one become 0."""
    rows = first_row + tl.arange(0, ROWS)
    sums = tl.load(log_sum + rows, mask=rows < length, other=float("inf"))
    return sums, tl.load(delta + rows, mask=rows < length, other=0.0)


@triton.jit
def logit_gradient(queries, keys, values, d_rows, sums, deltas, mask, scales, PASSES: tl.constexpr):
    """The gradient of a tile of logits, (queries, keys)."""
    logits = product(queries, tl.trans(keys), PASSES) * scales.logits + mask
    weights = tl.exp2((logits - sums[:, None]) * LOG2_E)
    return weights * (product(d_rows, tl.trans(values), PASSES) - deltas[:, None])


@triton.jit
def key_gradient(
    q,
    k,
    v,
    select_q,
    select_k,
    code,
    before,
    d_out,
    log_sum,
    delta,
    dk,
    dv,
    owners,
    counts,
    scales,
    SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    S_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    CODED: tl.constexpr,
    PASSES: tl.constexpr,
):
    """dk (B, owners, S, D) and dv (B, owners, S, E) of one tile of keys.

    An owner is a group of query heads with one key head and one selection head, which share F. Tiles are
    transposed here, keys by queries, so that products over the queries need no transposition of weights; a block
    is taken ROWS queries at a time.
    """
    length, n_keys, n_blocks = counts.length, counts.n_keys, counts.n_blocks
    tiles = tl.cdiv(n_keys, KEYS)
    start = tl.program_id(0) % tiles * KEYS
    row = (tl.program_id(0) // tiles).to(tl.int64)
    batch, owner = row // owners, row % owners
    shared = counts.heads // owners
    selector = owner * shared * counts.selectors // counts.heads
    group = owner * shared // (counts.heads // counts.groups)
    earlier = n_keys - length
    at = start + tl.arange(0, KEYS)
    code += batch * n_keys
    key = tokens(code, at, n_keys, CODED)
    before_row = (batch * counts.selectors + selector) * n_blocks

    keys = load_tile(k, batch, group, start, n_keys, KEYS, SIZE)
    values = load_tile(v, batch, group, start, n_keys, KEYS, V_SIZE)
    selected = load_tile(select_k, batch, selector, start, n_keys, KEYS, S_SIZE)
    dk_sum = tl.zeros([KEYS, padded(SIZE)], tl.float32)
    dv_sum = tl.zeros([KEYS, padded(V_SIZE)], tl.float32)
    nearest = tl.maximum(start - earlier, 0) // BLOCK
    far = tl.minimum(tl.cdiv(tl.maximum(start + KEYS - earlier, 0), BLOCK), n_blocks)
    running = tl.zeros([KEYS], tl.float32)
    for FAR in tl.static_range(2):
        lowest = far if FAR else nearest
        highest = n_blocks if FAR else far
        for start_row in range(lowest * BLOCK, highest * BLOCK, ROWS):
            query = tokens(code, earlier + start_row + tl.arange(0, ROWS), n_keys, CODED)
            selecting = load_tile(select_q, batch, selector, start_row, length, ROWS, S_SIZE)
            votes = votes_on(selecting, selected, query, key, scales.select, True, CODED, 1 - FAR, PASSES)
            at_before = before + (before_row + start_row // BLOCK) * n_keys + at
            known = tl.load(at_before, mask=at < n_keys, other=0.0)
            running = tl.where(start_row % BLOCK == 0, known, running)
            mask = masked_by(votes, running, query, key, True, CODED, 1 - FAR, PASSES)
            running += tl.sum(votes, 1)
            for head in range(owner * shared, (owner + 1) * shared):
                first = (batch * counts.heads + head) * length
                queries = load_tile(q, batch, head, start_row, length, ROWS, SIZE)
                d_rows = load_tile(d_out, batch, head, start_row, length, ROWS, V_SIZE)
                sums, deltas = load_sums(log_sum + first, delta + first, start_row, length, ROWS)
                logits = product(keys, tl.trans(queries), PASSES) * scales.logits + mask
                weights = tl.exp2((logits - sums[None, :]) * LOG2_E)
                dv_sum = plus_product(dv_sum, narrow(weights, d_rows.dtype), d_rows, PASSES)
                d_logits = weights * (product(values, tl.trans(d_rows), PASSES) - deltas[None, :])
                dk_sum = plus_product(dk_sum, narrow(d_logits, queries.dtype), queries, PASSES)
    dk_sum *= scales.logits
    store_rows(dk + row * n_keys * SIZE, SIZE, start, n_keys, dk_sum, KEYS, SIZE)
    store_rows(dv + row * n_keys * V_SIZE, V_SIZE, start, n_keys, dv_sum, KEYS, V_SIZE)

"""Gradients of the selection heads: what F does to the logits of all heads that listen to them.

With g the gradient of the logits, summed over those heads, a vote of query u on key j has the gradient
`-sum_{i > u} g[i, j]`: the later queries of its own block, and all later blocks. The first part comes with g itself
(`within_blocks`), which also writes g summed over each block; the running sum of those, from the end, gives the
second part to one more pass, of the selection heads alone (`from_later_blocks_*`).
"""

import triton
import triton.language as tl

from heedful.ops.selective.triton.kernels.backward import load_sums, logit_gradient
from heedful.ops.selective.triton.kernels.soft_mask import masked_by, sum_after, tokens, votes_on
from heedful.ops.selective.triton.kernels.tiles import (
    add_columns,
    add_rows,
    load_rows,
    load_tile,
    padded,
    plus_wide_product,
    store_rows,
    wide_product_left,
)


@triton.jit
def within_blocks(
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
    sums,
    d_select_q,
    d_select_k,
    n_spans,
    counts,
    scales,
    SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    S_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,
    CODED: tl.constexpr,
    PASSES: tl.constexpr,
):
    """One block of queries by SPAN tiles of keys.

    Writes sums (B, R, n_blocks, S), g summed over the queries of the block, and adds to d_select_q (B, R, T, D')
    and d_select_k (B, R, S, D'), both float32, with atomics: several programs add to the same row, in any order.
    With SPAN = 1 nothing is summed from tile to tile, which takes fewer registers and more atomics.
    """
    length, n_keys, n_blocks = counts.length, counts.n_keys, counts.n_blocks
    span = tl.program_id(0) % n_spans
    block = n_blocks - 1 - tl.program_id(0) // n_spans % n_blocks
    row = (tl.program_id(0) // n_spans // n_blocks).to(tl.int64)
    batch, selector = row // counts.selectors, row % counts.selectors
    first_head = tl.cdiv(selector * counts.heads, counts.selectors)
    last_head = tl.cdiv((selector + 1) * counts.heads, counts.selectors)
    earlier = n_keys - length
    end = tl.minimum(earlier + (block + 1) * BLOCK, n_keys)
    code += batch * n_keys
    query = tokens(code, earlier + block * BLOCK + tl.arange(0, BLOCK), n_keys, CODED)
    before += (row * n_blocks + block) * n_keys
    sums += (row * n_blocks + block) * n_keys
    d_select_q += row * length * S_SIZE
    d_select_k += row * n_keys * S_SIZE
    if span * SPAN * KEYS < end:
        selecting = load_tile(select_q, batch, selector, block * BLOCK, length, BLOCK, S_SIZE)
        gradient = tl.zeros([BLOCK, padded(S_SIZE)], tl.float32)
        for start in range(span * SPAN * KEYS, tl.minimum((span + 1) * SPAN * KEYS, end), KEYS):
            at = start + tl.arange(0, KEYS)
            key = tokens(code, at, n_keys, CODED)
            selected = load_tile(select_k, batch, selector, start, n_keys, KEYS, S_SIZE)
            votes = votes_on(selecting, selected, query, key, scales.select, False, CODED, True, PASSES)
            known = tl.load(before + at, mask=at < n_keys, other=0.0)
            mask = masked_by(votes, known, query, key, False, CODED, True, PASSES)
            g = tl.zeros([BLOCK, KEYS], tl.float32)
            for head in range(first_head, last_head):
                first = (batch * counts.heads + head) * length
                queries = load_tile(q, batch, head, block * BLOCK, length, BLOCK, SIZE)
                d_rows = load_tile(d_out, batch, head, block * BLOCK, length, BLOCK, V_SIZE)
                group = head // (counts.heads // counts.groups)
                keys = load_tile(k, batch, group, start, n_keys, KEYS, SIZE)
                values = load_tile(v, batch, group, start, n_keys, KEYS, V_SIZE)
                log_sums, deltas = load_sums(log_sum + first, delta + first, block * BLOCK, length, BLOCK)
                g += logit_gradient(queries, keys, values, d_rows, log_sums, deltas, mask, scales, PASSES)
            tl.store(sums + at, tl.sum(g, 0), mask=at < n_keys)
            d_votes = tl.where(votes > 0.0, -sum_after(g, PASSES), 0.0) * scales.select
            if SPAN == 1:
                part = plus_wide_product(gradient, d_votes, selected, PASSES)
                add_rows(d_select_q, block * BLOCK, length, part, BLOCK, S_SIZE)
            else:
                gradient = plus_wide_product(gradient, d_votes, selected, PASSES)
            # Transposed, so that the longer axis comes first and the product is one for tensor cores of Hopper.
            d_keys = wide_product_left(tl.trans(selecting), d_votes, PASSES)
            add_columns(d_select_k, start, n_keys, d_keys, KEYS, S_SIZE)
        if SPAN > 1:
            add_rows(d_select_q, block * BLOCK, length, gradient, BLOCK, S_SIZE)


@triton.jit
def from_later_blocks_to_queries(
    select_q,
    select_k,
    code,
    later,
    d_select_q,
    counts,
    scales,
    S_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    CODED: tl.constexpr,
    PASSES: tl.constexpr,
):
    """Add to d_select_q (B, R, T, D') of one block; later is (B, R, n_blocks, S)."""
    length, n_keys, n_blocks = counts.length, counts.n_keys, counts.n_blocks
    block = n_blocks - 1 - tl.program_id(0) % n_blocks
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    batch, selector = row // counts.selectors, row % counts.selectors
    earlier = n_keys - length
    end = tl.minimum(earlier + (block + 1) * BLOCK, n_keys)
    code += batch * n_keys
    query = tokens(code, earlier + block * BLOCK + tl.arange(0, BLOCK), n_keys, CODED)
    later += (row * n_blocks + block) * n_keys
    d_select_q += row * length * S_SIZE
    selecting = load_tile(select_q, batch, selector, block * BLOCK, length, BLOCK, S_SIZE)
    gradient = tl.zeros([BLOCK, padded(S_SIZE)], tl.float32)
    for start in range(0, end, KEYS):
        at = start + tl.arange(0, KEYS)
        key = tokens(code, at, n_keys, CODED)
        selected = load_tile(select_k, batch, selector, start, n_keys, KEYS, S_SIZE)
        votes = votes_on(selecting, selected, query, key, scales.select, False, CODED, True, PASSES)
        rest = tl.load(later + at, mask=at < n_keys, other=0.0) * -scales.select
        d_votes = tl.where(votes > 0.0, rest[None, :], 0.0)
        gradient = plus_wide_product(gradient, d_votes, selected, PASSES)
    gradient += load_rows(d_select_q, S_SIZE, block * BLOCK, length, BLOCK, S_SIZE)
    store_rows(d_select_q, S_SIZE, block * BLOCK, length, gradient, BLOCK, S_SIZE)


@triton.jit
def from_later_blocks_to_keys(
    select_q,
    select_k,
    code,
    later,
    d_select_k,
    counts,
    scales,
    S_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    CODED: tl.constexpr,
    PASSES: tl.constexpr,
):
    """Add to d_select_k (B, R, S, D') of one tile of keys; later is (B, R, n_blocks, S)."""
    length, n_keys, n_blocks = counts.length, counts.n_keys, counts.n_blocks
    tiles = tl.cdiv(n_keys, KEYS)
    start = tl.program_id(0) % tiles * KEYS
    row = (tl.program_id(0) // tiles).to(tl.int64)
    batch, selector = row // counts.selectors, row % counts.selectors
    earlier = n_keys - length
    at = start + tl.arange(0, KEYS)
    code += batch * n_keys
    key = tokens(code, at, n_keys, CODED)
    d_select_k += row * n_keys * S_SIZE
    selected = load_tile(select_k, batch, selector, start, n_keys, KEYS, S_SIZE)
    gradient = tl.zeros([KEYS, padded(S_SIZE)], tl.float32)
    for block in range(tl.maximum(start - earlier, 0) // BLOCK, n_blocks):
        query = tokens(code, earlier + block * BLOCK + tl.arange(0, BLOCK), n_keys, CODED)
        selecting = load_tile(select_q, batch, selector, block * BLOCK, length, BLOCK, S_SIZE)
        votes = votes_on(selecting, selected, query, key, scales.select, True, CODED, True, PASSES)
        rest = tl.load(later + (row * n_blocks + block) * n_keys + at, mask=at < n_keys, other=0.0)
        d_votes = tl.where(votes > 0.0, rest[:, None] * -scales.select, 0.0)
        gradient = plus_wide_product(gradient, d_votes, selecting, PASSES)
    gradient += load_rows(d_select_k, S_SIZE, start, n_keys, KEYS, S_SIZE)
    store_rows(d_select_k, S_SIZE, start, n_keys, gradient, KEYS, S_SIZE)

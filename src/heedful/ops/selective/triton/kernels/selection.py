"""Gradients of the selection heads: what F does to the logits of all heads that listen to them.

With g the gradient of the logits, summed over those heads, a vote of query u on key j has the gradient
`-sum_{i > u} g[i, j]`: the later queries of its own block, and all later blocks. The first part comes with g itself
(`within_blocks`), which also writes g summed over each block; the running sum of those, from the end, gives the
second part to one more pass, of the selection heads alone (`from_later_blocks_*`).
"""

import triton
import triton.language as tl

from heedful.ops.selective.triton.kernels.tiles import (
    LOG2_E,
    add_columns,
    add_rows,
    hide,
    load_codes,
    load_rows,
    plus_wide_product,
    product,
    store_rows,
    sum_after,
    sum_before,
    votes_of,
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
    d_batch,
    d_head,
    d_row,
    length,
    n_keys,
    n_blocks,
    n_spans,
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
    SPAN: tl.constexpr,
    CODED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One block of queries by SPAN tiles of keys.

    Writes sums (B, R, n_blocks, S), g summed over the queries of the block, and adds to d_select_q (B, R, T, D')
    and d_select_k (B, R, S, D'), both float32, with atomics: several programs add to the same row, in any order.
    """
    span = tl.program_id(0) % n_spans
    block = n_blocks - 1 - tl.program_id(0) // n_spans % n_blocks
    row = (tl.program_id(0) // n_spans // n_blocks).to(tl.int64)
    batch, selector = row // selectors, row % selectors
    shared = heads // groups
    earlier = n_keys - length
    end = tl.minimum(earlier + (block + 1) * BLOCK, n_keys)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    at = earlier + rows
    code += batch * n_keys
    at_code = load_codes(code, at, n_keys, CODED)
    select_k += batch * sk_batch + selector * sk_head
    before += (row * n_blocks + block) * n_keys
    sums += (row * n_blocks + block) * n_keys
    if span * SPAN * KEYS < end:
        select_q += batch * sq_batch + selector * sq_head
        selecting = load_rows(select_q, sq_row, block * BLOCK, length, BLOCK, S_SIZE, S_PADDED)
        gradient = tl.zeros([BLOCK, S_PADDED], tl.float32)
        for start in range(span * SPAN * KEYS, tl.minimum((span + 1) * SPAN * KEYS, end), KEYS):
            key = start + tl.arange(0, KEYS)
            key_code = load_codes(code, key, n_keys, CODED)
            at_, key_ = at[:, None], key[None, :]
            at_code_, key_code_ = at_code[:, None], key_code[None, :]
            selected = load_rows(select_k, sk_row, start, n_keys, KEYS, S_SIZE, S_PADDED)
            votes = product(selecting, tl.trans(selected), EXACT) * select_scale
            votes = votes_of(votes, at_, key_, at_code_, key_code_, CODED, True)
            earlier_votes = tl.load(before + key, mask=key < n_keys, other=0.0)
            soft_mask = sum_before(votes, BLOCK, EXACT) + earlier_votes[None, :]
            soft_mask = hide(-soft_mask, at_, key_, at_code_, key_code_, CODED, True)
            g = tl.zeros([BLOCK, KEYS], tl.float32)
            for head in range(
                tl.cdiv(selector * heads, selectors), tl.cdiv((selector + 1) * heads, selectors)
            ):
                first = (batch * heads + head) * length
                queries = load_rows(
                    q + batch * q_batch + head * q_head, q_row, block * BLOCK, length, BLOCK, SIZE, PADDED
                )
                d_rows = load_rows(
                    d_out + batch * d_batch + head * d_head,
                    d_row,
                    block * BLOCK,
                    length,
                    BLOCK,
                    V_SIZE,
                    V_PADDED,
                )
                group = head // shared
                keys = load_rows(
                    k + batch * k_batch + group * k_head, k_row, start, n_keys, KEYS, SIZE, PADDED
                )
                values = load_rows(
                    v + batch * v_batch + group * v_head, v_row, start, n_keys, KEYS, V_SIZE, V_PADDED
                )
                log_sums = tl.load(log_sum + first + rows, mask=rows < length, other=float("inf"))
                deltas = tl.load(delta + first + rows, mask=rows < length, other=0.0)
                logits = product(queries, tl.trans(keys), EXACT) * scale + soft_mask
                weights = tl.exp2((logits - log_sums[:, None]) * LOG2_E)
                g += weights * (product(d_rows, tl.trans(values), EXACT) - deltas[:, None])
            tl.store(sums + key, tl.sum(g, 0), mask=key < n_keys)
            d_votes = tl.where(votes > 0.0, -sum_after(g, BLOCK, EXACT), 0.0) * select_scale
            gradient = plus_wide_product(gradient, d_votes, selected, EXACT)
            # Transposed, so that the longer axis comes first and the product is one for tensor cores of Hopper.
            d_keys = wide_product_left(tl.trans(selecting), d_votes, EXACT)
            add_columns(d_select_k + row * n_keys * S_SIZE, start, n_keys, d_keys, KEYS, S_SIZE, S_PADDED)
        add_rows(
            d_select_q + row * length * S_SIZE,
            block * BLOCK,
            length,
            gradient,
            BLOCK,
            S_SIZE,
            S_PADDED,
        )


@triton.jit
def from_later_blocks_to_queries(
    select_q,
    select_k,
    code,
    later,
    d_select_q,
    sq_batch,
    sq_head,
    sq_row,
    sk_batch,
    sk_head,
    sk_row,
    length,
    n_keys,
    n_blocks,
    selectors,
    select_scale,
    S_SIZE: tl.constexpr,
    S_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    CODED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Add to d_select_q (B, R, T, D') of one block; later is (B, R, n_blocks, S)."""
    block = n_blocks - 1 - tl.program_id(0) % n_blocks
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    batch, selector = row // selectors, row % selectors
    earlier = n_keys - length
    end = tl.minimum(earlier + (block + 1) * BLOCK, n_keys)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    at = earlier + rows
    code += batch * n_keys
    at_code = load_codes(code, at, n_keys, CODED)
    select_k += batch * sk_batch + selector * sk_head
    later += (row * n_blocks + block) * n_keys
    d_select_q += row * length * S_SIZE
    selecting = load_rows(
        select_q + batch * sq_batch + selector * sq_head,
        sq_row,
        block * BLOCK,
        length,
        BLOCK,
        S_SIZE,
        S_PADDED,
    )
    gradient = tl.zeros([BLOCK, S_PADDED], tl.float32)
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS)
        key_code = load_codes(code, key, n_keys, CODED)
        selected = load_rows(select_k, sk_row, start, n_keys, KEYS, S_SIZE, S_PADDED)
        votes = product(selecting, tl.trans(selected), EXACT) * select_scale
        votes = votes_of(votes, at[:, None], key[None, :], at_code[:, None], key_code[None, :], CODED, True)
        rest = tl.load(later + key, mask=key < n_keys, other=0.0) * -select_scale
        d_votes = tl.where(votes > 0.0, rest[None, :], 0.0)
        gradient = plus_wide_product(gradient, d_votes, selected, EXACT)
    gradient += load_rows(d_select_q, S_SIZE, block * BLOCK, length, BLOCK, S_SIZE, S_PADDED)
    store_rows(d_select_q, S_SIZE, block * BLOCK, length, gradient, BLOCK, S_SIZE, S_PADDED)


@triton.jit
def from_later_blocks_to_keys(
    select_q,
    select_k,
    code,
    later,
    d_select_k,
    sq_batch,
    sq_head,
    sq_row,
    sk_batch,
    sk_head,
    sk_row,
    length,
    n_keys,
    n_blocks,
    selectors,
    select_scale,
    S_SIZE: tl.constexpr,
    S_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    CODED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Add to d_select_k (B, R, S, D') of one tile of keys; later is (B, R, n_blocks, S)."""
    tiles = tl.cdiv(n_keys, KEYS)
    start = tl.program_id(0) % tiles * KEYS
    row = (tl.program_id(0) // tiles).to(tl.int64)
    batch, selector = row // selectors, row % selectors
    earlier = n_keys - length
    key = start + tl.arange(0, KEYS)
    code += batch * n_keys
    key_code = load_codes(code, key, n_keys, CODED)
    select_q += batch * sq_batch + selector * sq_head
    d_select_k += row * n_keys * S_SIZE
    selected = load_rows(
        select_k + batch * sk_batch + selector * sk_head, sk_row, start, n_keys, KEYS, S_SIZE, S_PADDED
    )
    gradient = tl.zeros([KEYS, S_PADDED], tl.float32)
    for block in range(tl.maximum(start - earlier, 0) // BLOCK, n_blocks):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        at = earlier + rows
        at_code = load_codes(code, at, n_keys, CODED)
        selecting = load_rows(select_q, sq_row, block * BLOCK, length, BLOCK, S_SIZE, S_PADDED)
        votes = product(selected, tl.trans(selecting), EXACT) * select_scale
        votes = votes_of(votes, at[None, :], key[:, None], at_code[None, :], key_code[:, None], CODED, True)
        rest = tl.load(later + (row * n_blocks + block) * n_keys + key, mask=key < n_keys, other=0.0)
        d_votes = tl.where(votes > 0.0, rest[:, None] * -select_scale, 0.0)
        gradient = plus_wide_product(gradient, d_votes, selecting, EXACT)
    gradient += load_rows(d_select_k, S_SIZE, start, n_keys, KEYS, S_SIZE, S_PADDED)
    store_rows(d_select_k, S_SIZE, start, n_keys, gradient, KEYS, S_SIZE, S_PADDED)

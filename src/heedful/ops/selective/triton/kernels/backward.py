"""Gradients of q, k and v; those of the selection heads are in `selection.py`.

Tiles of logits are recomputed from the sums that the forward pass kept. A program owns what it writes, so there
are no atomics here.
"""

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
    sum_before_columns,
    votes_of,
)


@triton.jit
def dot_out(
    out,
    d_out,
    delta,
    d_batch,
    d_head,
    d_row,
    length,
    n_blocks,
    heads,
    V_SIZE: tl.constexpr,
    V_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta (B, H, T): out . d_out of each query."""
    block = tl.program_id(0) % n_blocks
    rows = block * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    batch, head = row // heads, row % heads
    x = load_rows(out + row * length * V_SIZE, V_SIZE, block * BLOCK, length, BLOCK, V_SIZE, V_PADDED)
    y = load_rows(
        d_out + batch * d_batch + head * d_head, d_row, block * BLOCK, length, BLOCK, V_SIZE, V_PADDED
    )
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
    """dq (B, H, T, D) of one block of queries, for HEADS heads that share F."""
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
    d_out += batch * d_batch + head.to(tl.int64) * d_head
    k_base = k + batch * k_batch + group.to(tl.int64) * k_head
    v_base = v + batch * v_batch + group.to(tl.int64) * v_head
    k_base2 = k + batch * k_batch + group2.to(tl.int64) * k_head
    v_base2 = v + batch * v_batch + group2.to(tl.int64) * v_head
    select_q += batch * sq_batch + selector.to(tl.int64) * sq_head
    select_k += batch * sk_batch + selector.to(tl.int64) * sk_head
    before += ((batch * selectors + selector) * n_blocks + block) * n_keys
    first = (batch * heads + head) * length

    queries = load_rows(q, q_row, block * BLOCK, length, BLOCK, SIZE, PADDED)
    d_rows = load_rows(d_out, d_row, block * BLOCK, length, BLOCK, V_SIZE, V_PADDED)
    sums = tl.load(log_sum + first + rows, mask=rows < length, other=float("inf"))
    deltas = tl.load(delta + first + rows, mask=rows < length, other=0.0)
    queries2, d_rows2, sums2, deltas2 = queries, d_rows, sums, deltas
    if HEADS == 2:
        queries2 = load_rows(q + q_head, q_row, block * BLOCK, length, BLOCK, SIZE, PADDED)
        d_rows2 = load_rows(d_out + d_head, d_row, block * BLOCK, length, BLOCK, V_SIZE, V_PADDED)
        sums2 = tl.load(log_sum + first + length + rows, mask=rows < length, other=float("inf"))
        deltas2 = tl.load(delta + first + length + rows, mask=rows < length, other=0.0)
    selecting = load_rows(select_q, sq_row, block * BLOCK, length, BLOCK, S_SIZE, S_PADDED)
    gradient = tl.zeros([BLOCK, PADDED], tl.float32)
    gradient2 = gradient
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
            gradient = _add(gradient, queries, keys, values, d_rows, sums, deltas, soft_mask, scale, EXACT)
            if HEADS == 2:
                keys = load_rows(k_base2, k_row, start, n_keys, KEYS, SIZE, PADDED)
                values = load_rows(v_base2, v_row, start, n_keys, KEYS, V_SIZE, V_PADDED)
                gradient2 = _add(
                    gradient2, queries2, keys, values, d_rows2, sums2, deltas2, soft_mask, scale, EXACT
                )
    store_rows(dq + first * SIZE, SIZE, block * BLOCK, length, gradient * scale, BLOCK, SIZE, PADDED)
    if HEADS == 2:
        store_rows(
            dq + (first + length) * SIZE, SIZE, block * BLOCK, length, gradient2 * scale, BLOCK, SIZE, PADDED
        )


@triton.jit
def _add(gradient, queries, keys, values, d_rows, sums, deltas, soft_mask, scale, EXACT: tl.constexpr):
    """One tile more in the gradient of a block of queries."""
    logits = product(queries, tl.trans(keys), EXACT) * scale + soft_mask
    weights = tl.exp2((logits - sums[:, None]) * LOG2_E)
    d_logits = weights * (product(d_rows, tl.trans(values), EXACT) - deltas[:, None])
    return plus_product(gradient, narrow(d_logits, keys.dtype), keys, EXACT)


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
    heads,
    groups,
    selectors,
    owners,
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
    ROWS: tl.constexpr,
    CODED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """dk (B, owners, S, D) and dv (B, owners, S, E) of one tile of keys.

    An owner is a group of query heads with one key head and one selection head, which share F. Tiles are
    transposed here, keys by queries, so that products over the queries need no transposition of weights; a block
    is taken ROWS queries at a time.
    """
    tiles = tl.cdiv(n_keys, KEYS)
    start = tl.program_id(0) % tiles * KEYS
    row = (tl.program_id(0) // tiles).to(tl.int64)
    batch, owner = row // owners, row % owners
    shared = heads // owners
    selector = owner * shared * selectors // heads
    group = owner * shared // (heads // groups)
    earlier = n_keys - length
    key = start + tl.arange(0, KEYS)
    code += batch * n_keys
    key_code = load_codes(code, key, n_keys, CODED)
    select_q += batch * sq_batch + selector * sq_head
    select_k += batch * sk_batch + selector * sk_head
    before_row = (batch * selectors + selector) * n_blocks

    keys = load_rows(k + batch * k_batch + group * k_head, k_row, start, n_keys, KEYS, SIZE, PADDED)
    values = load_rows(v + batch * v_batch + group * v_head, v_row, start, n_keys, KEYS, V_SIZE, V_PADDED)
    selected = load_rows(select_k, sk_row, start, n_keys, KEYS, S_SIZE, S_PADDED)
    dk_sum = tl.zeros([KEYS, PADDED], tl.float32)
    dv_sum = tl.zeros([KEYS, V_PADDED], tl.float32)
    nearest = tl.maximum(start - earlier, 0) // BLOCK
    far = tl.minimum(tl.cdiv(tl.maximum(start + KEYS - earlier, 0), BLOCK), n_blocks)
    running = tl.zeros([KEYS], tl.float32)
    for FAR in tl.static_range(2):
        lowest = far if FAR else nearest
        highest = n_blocks if FAR else far
        for start_row in range(lowest * BLOCK, highest * BLOCK, ROWS):
            block = start_row // BLOCK
            rows = start_row + tl.arange(0, ROWS)
            at = earlier + rows
            at_code = load_codes(code, at, n_keys, CODED)
            at_, key_ = at[None, :], key[:, None]
            at_code_, key_code_ = at_code[None, :], key_code[:, None]
            selecting = load_rows(select_q, sq_row, start_row, length, ROWS, S_SIZE, S_PADDED)
            votes = product(selected, tl.trans(selecting), EXACT) * select_scale
            votes = votes_of(votes, at_, key_, at_code_, key_code_, CODED, 1 - FAR)
            at_before = before + (before_row + block) * n_keys + key
            known = tl.load(at_before, mask=key < n_keys, other=0.0)
            running = tl.where(start_row % BLOCK == 0, known, running)
            soft_mask = sum_before_columns(votes, ROWS, EXACT) + running[:, None]
            running += tl.sum(votes, 1)
            soft_mask = hide(-soft_mask, at_, key_, at_code_, key_code_, CODED, 1 - FAR)
            for head in range(owner * shared, (owner + 1) * shared):
                first = (batch * heads + head) * length
                head_q = q + batch * q_batch + head * q_head
                head_d = d_out + batch * d_batch + head * d_head
                queries = load_rows(head_q, q_row, start_row, length, ROWS, SIZE, PADDED)
                d_rows = load_rows(head_d, d_row, start_row, length, ROWS, V_SIZE, V_PADDED)
                sums = tl.load(log_sum + first + rows, mask=rows < length, other=float("inf"))
                deltas = tl.load(delta + first + rows, mask=rows < length, other=0.0)
                logits = product(keys, tl.trans(queries), EXACT) * scale + soft_mask
                weights = tl.exp2((logits - sums[None, :]) * LOG2_E)
                dv_sum = plus_product(dv_sum, narrow(weights, d_rows.dtype), d_rows, EXACT)
                d_logits = weights * (product(values, tl.trans(d_rows), EXACT) - deltas[None, :])
                dk_sum = plus_product(dk_sum, narrow(d_logits, queries.dtype), queries, EXACT)
    store_rows(dk + row * n_keys * SIZE, SIZE, start, n_keys, dk_sum * scale, KEYS, SIZE, PADDED)
    store_rows(dv + row * n_keys * V_SIZE, V_SIZE, start, n_keys, dv_sum, KEYS, V_SIZE, V_PADDED)

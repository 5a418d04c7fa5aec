"""Votes of each block of queries, summed, and their running sums: F before each block."""

import triton
import triton.language as tl

from heedful.ops.selective.triton.kernels.soft_mask import tokens, votes_on
from heedful.ops.selective.triton.kernels.tiles import load_tile


@triton.jit
def sum_votes(
    select_q,
    select_k,
    code,
    sums,
    counts,
    scales,
    n_spans,
    S_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,
    CODED: tl.constexpr,
    PASSES: tl.constexpr,
):
    """Votes that a block of queries casts on SPAN tiles of keys: sums (B, R, n_blocks, S).

    Not written where no key of the tile comes before the end of the block.
    """
    length, n_keys, n_blocks = counts.length, counts.n_keys, counts.n_blocks
    span = tl.program_id(0) % n_spans
    block = tl.program_id(0) // n_spans % n_blocks
    row = (tl.program_id(0) // n_spans // n_blocks).to(tl.int64)
    batch, selector = row // counts.selectors, row % counts.selectors
    earlier = n_keys - length
    end = tl.minimum(earlier + (block + 1) * BLOCK, n_keys)
    code += batch * n_keys
    query = tokens(code, earlier + block * BLOCK + tl.arange(0, BLOCK), n_keys, CODED)
    if span * SPAN * KEYS < end:
        selecting = load_tile(select_q, batch, selector, block * BLOCK, length, BLOCK, S_SIZE)
        for start in range(span * SPAN * KEYS, tl.minimum((span + 1) * SPAN * KEYS, end), KEYS):
            at = start + tl.arange(0, KEYS)
            key = tokens(code, at, n_keys, CODED)
            selected = load_tile(select_k, batch, selector, start, n_keys, KEYS, S_SIZE)
            votes = votes_on(selecting, selected, query, key, scales.select, False, CODED, True, PASSES)
            tl.store(sums + (row * n_blocks + block) * n_keys + at, tl.sum(votes, 0), mask=at < n_keys)


@triton.jit
def running_sum(
    sums,
    start,
    before,
    after,
    counts,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """For each block, what the blocks before it (REVERSE: after it) sum to, on top of `start` (B, R, S).

    Reads sums and writes before, both (B, R, n_blocks, S), and the sum of everything to after (B, R, S).
    Sums of keys that only come after a block are taken as 0 and not read.
    """
    length, n_keys, n_blocks = counts.length, counts.n_keys, counts.n_blocks
    tiles = tl.cdiv(n_keys, KEYS)
    key = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    step = tl.arange(0, STEP)
    carry = tl.load(start + row * n_keys + key, mask=key < n_keys, other=0.0)
    for first in range(0, n_blocks, STEP):
        order = first + step
        block = n_blocks - 1 - order if REVERSE else order
        previous = block + 1 if REVERSE else block - 1
        here = (row * n_blocks + block)[:, None] * n_keys + key[None, :]
        there = (row * n_blocks + previous)[:, None] * n_keys + key[None, :]
        inside = (order < n_blocks)[:, None] & (key < n_keys)[None, :]
        written = key[None, :] < (n_keys - length + (block + 1) * BLOCK)[:, None]
        written_there = key[None, :] < (n_keys - length + (previous + 1) * BLOCK)[:, None]
        x = tl.load(sums + here, mask=inside & written, other=0.0)
        # Shifted by one block instead of subtracted: no cancellation.
        shifted = tl.load(sums + there, mask=inside & written_there & (step > 0)[:, None], other=0.0)
        tl.store(before + here, carry[None, :] + tl.cumsum(shifted, 0), mask=inside)
        carry += tl.sum(x, 0)
    tl.store(after + row * n_keys + key, carry, mask=key < n_keys)

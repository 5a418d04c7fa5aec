"""A tile of votes S and of F, as every kernel makes them, and who sees whom.

A tile is (queries, keys), or (keys, queries) with KEYS_FIRST. Tokens are given by their places among the keys and
their codes (see `codes.py`), in a pair (place, code). NEAR: some of the keys may not come before the queries.
"""

import triton
import triton.language as tl

from heedful.ops.selective.triton.kernels.tiles import narrow, plus_product, product


@triton.jit
def tokens(code, at, n_keys, CODED: tl.constexpr):
    """The tokens at some places; the code is -1 beyond the last one, and anything if there are no codes."""
    if CODED:
        return at, tl.load(code + at, mask=at < n_keys, other=-1)
    else:
        return at, at


@triton.jit
def votes_on(
    selecting,
    selected,
    query,
    key,
    scale,
    KEYS_FIRST: tl.constexpr,
    CODED: tl.constexpr,
    NEAR: tl.constexpr,
    PASSES: tl.constexpr,
):
    """S: the votes of queries `selecting` (queries, D') on keys `selected` (keys, D')."""
    if KEYS_FIRST:
        logits = product(selected, tl.trans(selecting), PASSES) * scale
    else:
        logits = product(selecting, tl.trans(selected), PASSES) * scale
    at, at_code = _facing(query, KEYS_FIRST)
    of, of_code = _facing(key, not KEYS_FIRST)
    if CODED:
        voted = (of < at) & (at_code >= 0) & ((at_code >> 1) == (of_code >> 1)) & ((of_code & 1) == 0)
    elif NEAR:
        voted = (of < at) & (of > 0)
    else:
        voted = of > 0
    return tl.where(voted & (logits > 0.0), logits, 0.0)


@triton.jit
def masked_by(
    votes,
    known,
    query,
    key,
    KEYS_FIRST: tl.constexpr,
    CODED: tl.constexpr,
    NEAR: tl.constexpr,
    PASSES: tl.constexpr,
):
    """What is added to the logits: -F, and -inf where a query does not see a key.

    F is what was known of each key before the first query of the tile, and the tile's own earlier votes.
    """
    if KEYS_FIRST:
        soft_mask = _sum_before_columns(votes, PASSES) + known[:, None]
    else:
        soft_mask = _sum_before(votes, PASSES) + known[None, :]
    at, at_code = _facing(query, KEYS_FIRST)
    of, of_code = _facing(key, not KEYS_FIRST)
    if CODED:
        seen = (of <= at) & (at_code >= 0) & ((at_code >> 1) == (of_code >> 1))
        return tl.where(seen, -soft_mask, float("-inf"))
    elif NEAR:
        return tl.where(of <= at, -soft_mask, float("-inf"))
    else:
        return -soft_mask


@triton.jit
def sum_after(x, PASSES: tl.constexpr):
    """Row i: the sum of the rows u > i of x."""
    at = tl.arange(0, x.shape[0])
    return _sum_rows(at[:, None] < at[None, :], x, PASSES)


@triton.jit
def _facing(token, ACROSS: tl.constexpr):
    """Places and codes along the columns of a tile, or along its rows."""
    place, code = token
    if ACROSS:
        return place[None, :], code[None, :]
    else:
        return place[:, None], code[:, None]


@triton.jit
def _sum_before(x, PASSES: tl.constexpr):
    """Row i: the sum of the rows u < i of x."""
    at = tl.arange(0, x.shape[0])
    return _sum_rows(at[:, None] > at[None, :], x, PASSES)


@triton.jit
def _sum_rows(taken, x, PASSES: tl.constexpr):
    if PASSES:
        return product(taken.to(tl.float32), x, 3)
    else:
        # Two bfloat16 hold 16 bits of x, and their products with 0 and 1 are exact.
        high = narrow(x, tl.bfloat16)
        low = narrow(x - high.to(tl.float32), tl.bfloat16)
        ones = taken.to(tl.float32).to(tl.bfloat16)
        return plus_product(product(ones, high, PASSES), ones, low, PASSES)


@triton.jit
def _sum_before_columns(x, PASSES: tl.constexpr):
    """Column i: the sum of the columns u < i of x."""
    at = tl.arange(0, x.shape[1])
    taken = at[:, None] < at[None, :]
    if PASSES:
        return product(x, taken.to(tl.float32), 3)
    else:
        high = narrow(x, tl.bfloat16)
        low = narrow(x - high.to(tl.float32), tl.bfloat16)
        ones = taken.to(tl.float32).to(tl.bfloat16)
        return plus_product(product(high, ones, PASSES), low, ones, PASSES)

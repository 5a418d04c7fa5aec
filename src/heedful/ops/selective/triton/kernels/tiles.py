"""What the kernels share: loading rows, votes, F inside a block, and who sees whom."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_rows(base, stride, first, n_rows, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """ROWS rows from the first on of a (n_rows, SIZE) matrix, (ROWS, PADDED); 0 beyond its edges."""
    offsets, inside = _places(stride, first, n_rows, ROWS, SIZE, PADDED)
    return tl.load(base + _wide(first) * stride + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(base, stride, first, n_rows, x, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Write x to rows of a (n_rows, SIZE) matrix."""
    offsets, inside = _places(stride, first, n_rows, ROWS, SIZE, PADDED)
    tl.store(base + _wide(first) * stride + offsets, narrow(x, base.dtype.element_ty), mask=inside)


@triton.jit
def add_rows(base, first, n_rows, x, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Add x to rows of a contiguous (n_rows, SIZE) matrix that other programs add to as well."""
    rows, columns = first + tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    inside = rows < n_rows
    if SIZE < PADDED:
        inside = inside & (columns < SIZE)
    tl.atomic_add(base + (rows * SIZE + columns), x, mask=inside, sem="relaxed")


@triton.jit
def add_columns(base, first, n_rows, x, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """The same for x (PADDED, ROWS), transposed."""
    rows, columns = first + tl.arange(0, ROWS)[None, :], tl.arange(0, PADDED)[:, None]
    inside = rows < n_rows
    if SIZE < PADDED:
        inside = inside & (columns < SIZE)
    tl.atomic_add(base + (rows * SIZE + columns), x, mask=inside, sem="relaxed")


@triton.jit
def _places(stride, first, n_rows, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = rows[:, None] < n_rows - first
    if SIZE < PADDED:
        inside = inside & (columns[None, :] < SIZE)
    return rows[:, None] * stride + columns[None, :], inside


@triton.jit
def _wide(first):
    """As int64: rows times strides may not fit int32."""
    return tl.zeros([], tl.int64) + first


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """The float32 x rounded to dtype."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter would truncate
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def plus_product(total, a, b, EXACT: tl.constexpr):
    """total + a b in float32; EXACT: for float32 factors, to about 1e-6."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    if EXACT:
        return tl.dot(a, b, total, input_precision="tf32x3")
    else:
        return tl.dot(a, b, total)


@triton.jit
def product(a, b, EXACT: tl.constexpr):
    """The matrix product a b in float32."""
    return plus_product(None, a, b, EXACT)


@triton.jit
def plus_wide_product(total, a, b, EXACT: tl.constexpr):
    """total + a b for float32 a of any size: sums over many queries may not fit float16."""
    if b.dtype == tl.float16:
        return plus_product(total, a, b.to(tl.float32), EXACT)
    else:
        return plus_product(total, narrow(a, b.dtype), b, EXACT)


@triton.jit
def wide_product_left(a, b, EXACT: tl.constexpr):
    """The product a b for float32 b of any size."""
    if a.dtype == tl.float16:
        return product(a.to(tl.float32), b, EXACT)
    else:
        return product(a, narrow(b, a.dtype), EXACT)


@triton.jit
def sum_before(x, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """Row i: the sum of the rows u < i of x (BLOCK, n)."""
    at = tl.arange(0, BLOCK)
    return _sum_rows(at[:, None] > at[None, :], x, EXACT)


@triton.jit
def sum_after(x, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """Row i: the sum of the rows u > i of x (BLOCK, n)."""
    at = tl.arange(0, BLOCK)
    return _sum_rows(at[:, None] < at[None, :], x, EXACT)


@triton.jit
def _sum_rows(taken, x, EXACT: tl.constexpr):
    if EXACT:
        return product(taken.to(tl.float32), x, EXACT)
    else:
        # Two bfloat16 hold 16 bits of x, and their products with 0 and 1 are exact.
        high = narrow(x, tl.bfloat16)
        low = narrow(x - high.to(tl.float32), tl.bfloat16)
        ones = taken.to(tl.float32).to(tl.bfloat16)
        return plus_product(product(ones, high, EXACT), ones, low, EXACT)


@triton.jit
def sum_before_columns(x, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """Column i: the sum of the columns u < i of x (n, BLOCK)."""
    at = tl.arange(0, BLOCK)
    taken = at[:, None] < at[None, :]
    if EXACT:
        return product(x, taken.to(tl.float32), EXACT)
    else:
        high = narrow(x, tl.bfloat16)
        low = narrow(x - high.to(tl.float32), tl.bfloat16)
        ones = taken.to(tl.float32).to(tl.bfloat16)
        return plus_product(product(high, ones, EXACT), low, ones, EXACT)


@triton.jit
def load_codes(code, at, n_keys, CODED: tl.constexpr):
    """Codes of tokens (see `codes.py`), -1 beyond the last one; anything if there are none."""
    if CODED:
        return tl.load(code + at, mask=at < n_keys, other=-1)
    else:
        return at


@triton.jit
def votes_of(logits, at, key, at_code, key_code, CODED: tl.constexpr, NEAR: tl.constexpr):
    """S from the logits of a selection head.

    Args:
        logits: a tile, in either orientation.
        at: where the queries stand among the keys, with an axis of length 1 for the keys.
        key: the keys, with an axis of length 1 for the queries.
        at_code: codes of the queries, like `at`.
        key_code: codes of the keys, like `key`.
        CODED: there is padding or there are segments.
        NEAR: some of the keys may not come before the queries.
    """
    if CODED:
        voted = (key < at) & (at_code >= 0) & ((at_code >> 1) == (key_code >> 1)) & ((key_code & 1) == 0)
    elif NEAR:
        voted = (key < at) & (key > 0)
    else:
        voted = key > 0
    return tl.where(voted & (logits > 0.0), logits, 0.0)


@triton.jit
def hide(logits, at, key, at_code, key_code, CODED: tl.constexpr, NEAR: tl.constexpr):
    """-inf where a query does not see a key."""
    if CODED:
        seen = (key <= at) & (at_code >= 0) & ((at_code >> 1) == (key_code >> 1))
        return tl.where(seen, logits, float("-inf"))
    elif NEAR:
        return tl.where(key <= at, logits, float("-inf"))
    else:
        return logits

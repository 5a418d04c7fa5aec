"""What the kernels share: loading rows and products."""

import triton
import triton.language as tl

from heedful.ops.selective.triton.tilings import padded_size

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
padded = triton.constexpr_function(padded_size)


@triton.jit
def load_tile(x, batch, head, first, n_rows, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """ROWS tokens from the first on of one head of x, `Heads`: (ROWS, SIZE padded), 0 beyond the edges."""
    base = x.data + batch * x.batch + _wide(head) * x.head
    return load_rows(base, x.row, first, n_rows, ROWS, SIZE)


@triton.jit
def load_rows(base, stride, first, n_rows, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """ROWS rows from the first on of a (n_rows, SIZE) matrix, (ROWS, SIZE padded); 0 beyond its edges."""
    offsets, inside = _places(stride, first, n_rows, ROWS, SIZE)
    return tl.load(base + _wide(first) * stride + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(base, stride, first, n_rows, x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Write x to rows of a (n_rows, SIZE) matrix."""
    offsets, inside = _places(stride, first, n_rows, ROWS, SIZE)
    tl.store(base + _wide(first) * stride + offsets, narrow(x, base.dtype.element_ty), mask=inside)


@triton.jit
def add_rows(base, first, n_rows, x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Add x to rows of a contiguous (n_rows, SIZE) matrix that other programs add to as well."""
    rows, columns = first + tl.arange(0, ROWS)[:, None], tl.arange(0, padded(SIZE))[None, :]
    inside = rows < n_rows
    if padded(SIZE) > SIZE:
        inside = inside & (columns < SIZE)
    tl.atomic_add(base + (rows * SIZE + columns), x, mask=inside, sem="relaxed")


@triton.jit
def add_columns(base, first, n_rows, x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """The same for x (SIZE padded, ROWS), transposed."""
    rows, columns = first + tl.arange(0, ROWS)[None, :], tl.arange(0, padded(SIZE))[:, None]
    inside = rows < n_rows
    if padded(SIZE) > SIZE:
        inside = inside & (columns < SIZE)
    tl.atomic_add(base + (rows * SIZE + columns), x, mask=inside, sem="relaxed")


@triton.jit
def _places(stride, first, n_rows, ROWS: tl.constexpr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, padded(SIZE))
    inside = rows[:, None] < n_rows - first
    if padded(SIZE) > SIZE:
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
def plus_product(total, a, b, PASSES: tl.constexpr):
    """total + a b in float32, of factors of 16 bits, or of float32: see `op.Job`."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    if PASSES == 3:
        return tl.dot(a, b, total, input_precision="tf32x3")
    elif PASSES == 1:
        return tl.dot(a, b, total, input_precision="tf32")
    else:
        return tl.dot(a, b, total)


@triton.jit
def product(a, b, PASSES: tl.constexpr):
    """The matrix product a b in float32."""
    return plus_product(None, a, b, PASSES)


@triton.jit
def plus_wide_product(total, a, b, PASSES: tl.constexpr):
    """total + a b for float32 a of any size: sums over many queries may not fit float16."""
    if b.dtype == tl.float16:
        return plus_product(total, a, b.to(tl.float32), PASSES)
    else:
        return plus_product(total, narrow(a, b.dtype), b, PASSES)


@triton.jit
def wide_product_left(a, b, PASSES: tl.constexpr):
    """The product a b for float32 b of any size."""
    if a.dtype == tl.float16:
        return product(a.to(tl.float32), b, PASSES)
    else:
        return product(a, narrow(b, a.dtype), PASSES)

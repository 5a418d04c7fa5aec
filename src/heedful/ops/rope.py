"""Rotary position embedding (Su et al., arXiv 2104.09864) in the rotate-half layout."""

from collections.abc import Callable

import torch
from torch import Tensor

from heedful.ops.checks import check_device, check_float, check_tensor
from heedful.ops.precision import wide_dtype


def rope(x: Tensor, positions: Tensor, *, theta: float = 10000.0, base_dim: int | None = None) -> Tensor:
    """Rotate feature pairs (i, i + D/2) of `x` by `positions * theta ** (-2 i / base_dim)`.

    Args:
        x: (B, H, T, D) with D even.
        positions: (T,) or (B, T) integers, the absolute position of each token.
        theta: the base of the frequencies.
        base_dim: the size whose frequencies are used, D by default. SAS widens heads from D to D̂ and
            keeps `base_dim = D`: the first D/2 frequencies are those of the narrow head and the rest
            continue the progression, so that an identity start equals plain attention.

    Returns:
        (B, H, T, D) in the dtype of `x`; the angles are computed in float32 (float64 for float64).

    Raises:
        ValueError: if D is odd or `positions` does not fit.
    """
    check_float("x", check_tensor("x", x, "(B, H, T, D)"))
    batch, _, length, size = x.shape
    if size % 2:
        raise ValueError(f"rope rotates pairs of features, so D must be even, got {size}")
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions must be a tensor of integers, got {type(positions).__name__}")
    check_device("positions", positions, "x", x)
    if not theta > 0:
        raise ValueError(f"theta must be greater than 0, got {theta}")
    if positions.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(
            f"positions must have shape (T,) = ({length},) or (B, T) = ({batch}, {length}), "
            f"got {tuple(positions.shape)}"
        )
    cos, sin = rotation(positions, size, wide_dtype(x), theta=theta, base_dim=base_dim)
    return rotate(x, cos[:, None], sin[:, None])  # one rotation for all heads


def rotation(
    positions: Tensor, size: int, dtype: torch.dtype, *, theta: float = 10000.0, base_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, (1 or B, T, D/2), for heads of `size` features; see `rope`."""
    exponent = torch.arange(0, size, 2, device=positions.device, dtype=dtype) / (base_dim or size)
    angles = torch.atleast_2d(positions).to(dtype)[..., None] * theta**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the feature pairs (i, i + D/2) of x (..., D) by angles (..., D/2), in the precision of the angles."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def in_order(
    x: Tensor,
    norm: Callable[[Tensor], Tensor] | None,
    turn: Callable[[Tensor], Tensor] | None,
    norm_first: bool,
) -> Tensor:
    """What queries and keys go through before they meet: QK-norm and rotation, either of them or none."""
    for step in (norm, turn) if norm_first else (turn, norm):
        if step is not None:
            x = step(x)
    return x

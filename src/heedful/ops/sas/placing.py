"""QK-norm and rotary positions of expanded heads, on one piece of the tokens, forward and backward."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.ops.precision import wide_dtype
from heedful.ops.rope import in_order, rotate


class Placement(NamedTuple):
    """What queries and keys go through after their expansion."""

    norm: Tensor | None
    """(D̂,), the gains of the RMS norm; None: no norm."""
    eps: float
    """Epsilon of the norm."""
    cos: Tensor | None
    """(1 or B, T, D̂/2), see `heedful.ops.rope.rotation`; None: no rotation."""
    sin: Tensor | None
    """(1 or B, T, D̂/2)."""
    norm_first: bool
    """Whether the norm comes before the rotation."""

    def of(self, rows: slice, tokens: slice) -> "Placement":
        """The placement of some rows of the batch and some of their tokens."""
        if self.cos is None or self.sin is None:
            return self
        rows = rows if self.cos.shape[0] > 1 else slice(None)
        return self._replace(cos=self.cos[rows, tokens], sin=self.sin[rows, tokens])

    def result_dtype(self, x: Tensor) -> torch.dtype:
        """Of the result: that of the gains, which under autocast are wider than `x`."""
        return x.dtype if self.norm is None else self.norm.dtype


def place(x: Tensor, placement: Placement) -> Tensor:
    """Norm and rotation of (B, Ĥ, T, D̂), in the order of `placement`."""
    norm, eps, cos, sin, norm_first = placement
    normed = None if norm is None else lambda x: F.rms_norm(x, norm.shape, norm, eps)
    turned = None if cos is None or sin is None else lambda x: rotate(x, cos[:, None], sin[:, None])
    return in_order(x.to(placement.result_dtype(x)), normed, turned, norm_first)


def place_piece(x: Tensor, placement: Placement, out: Tensor) -> None:
    """`place` of x (Ĥ, b, t, D̂), which may be overwritten, into out."""
    norm, eps, cos, sin, norm_first = placement
    x = x.to(wide_dtype(out))
    if norm is not None and norm_first:
        x.mul_(_shrink(x, eps)).mul_(norm)
    if cos is not None and sin is not None:
        direct = out.dtype == x.dtype and (norm is None or norm_first)
        x = _rotated(x, cos, sin, out if direct else torch.empty_like(x))
    if norm is not None and not norm_first:
        x.mul_(_shrink(x, eps)).mul_(norm)
    if x is not out:
        out.copy_(x)


def place_backward(x: Tensor | None, placement: Placement, grad: Tensor, d_norm: Tensor | None) -> Tensor:
    """The gradient of x (Ĥ, b, t, D̂), which only a norm needs; that of the gains is added to `d_norm`."""
    norm, eps, cos, sin, norm_first = placement
    if norm is None and cos is None:
        return grad
    grad = grad.to(wide_dtype(grad))
    if x is not None and norm is not None and not norm_first:
        x = x.to(grad.dtype)
        x = x if cos is None or sin is None else _rotated(x, cos, sin, torch.empty_like(x))
        grad = _norm_backward(x, norm, eps, grad, d_norm)
    if cos is not None and sin is not None:
        grad = _rotated(grad, cos, -sin, grad.new_empty(grad.shape))
    if x is not None and norm is not None and norm_first:
        grad = _norm_backward(x.to(grad.dtype), norm, eps, grad, d_norm)
    return grad


def _shrink(x: Tensor, eps: float) -> Tensor:
    """What the norm multiplies x (..., D̂) by, (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_backward(x: Tensor, norm: Tensor, eps: float, grad: Tensor, d_norm: Tensor | None) -> Tensor:
    shrink = _shrink(x, eps)
    unit = x * shrink
    product = grad * unit
    if d_norm is not None:
        d_norm += product.flatten(0, -2).sum(0)
    norm = norm.to(x.dtype)
    mean = (product @ norm).div_(x.shape[-1])[..., None]
    return (grad * norm).addcmul_(unit, mean, value=-1).mul_(shrink)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    (first, second), (a, b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=a).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=b).addcmul_(first, sin)
    return out


NOWHERE = Placement(None, 0.0, None, None, True)

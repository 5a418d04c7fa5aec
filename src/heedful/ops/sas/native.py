"""The expansion of SAS by the C++ operator, and the check that a fresh build has to pass."""

import ctypes

import torch
from torch import Tensor

from heedful.ops.native.library import EXPANSION_WEIGHTS, ExpandJob, address, check_with, library, pool
from heedful.ops.sas.placing import Placement, place
from heedful.ops.sas.steps import simulate_features, simulate_heads

ALLOWED = {torch.float32: 2e-5, torch.float64: 1e-11}
"""Of the largest value."""

Weights = tuple[Tensor | None, ...]
"""Convolutions, features and gains with their biases, in the order of `EXPANSION_WEIGHTS`."""


def run_expand(
    x: Tensor, weights: Weights, placement: Placement, handle: ctypes.CDLL | None = None
) -> Tensor:
    """X (B, T, H, D) -> (B, Ĥ, T, D̂), by `handle` where it is not verified yet. No gradients.

    All tensors have one dtype, float32 or float64, and lie on the CPU.
    """
    job, held = _job(x, weights, placement)
    out = x.new_empty(x.shape[0], job.sim_heads, x.shape[1], job.sim_size or job.size)
    job.out = address(out)
    (handle or library(x.dtype)).heedful_expand(ctypes.byref(job))
    del held
    return out


def run_expand_backward(
    grad: Tensor,
    x: Tensor,
    weights: Weights,
    placement: Placement,
    need_x: bool,
    need_weights: bool,
    handle: ctypes.CDLL | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x and of each weight; empty where there is no weight or none is needed."""
    job, held = _job(x, weights, placement)
    grad = _readable(grad)
    d_x = x.new_empty(x.shape if need_x else 0)
    found = [x.new_empty(w.shape if w is not None and need_weights else 0) for w in weights]
    job.grad, job.gs[:] = address(grad), grad.stride()[:3]
    job.dx = address(d_x) if need_x else None
    for name, weight, d in zip(EXPANSION_WEIGHTS, weights, found, strict=True):
        setattr(job, f"d_{name}", address(d) if weight is not None and need_weights else None)
    (handle or library(x.dtype)).heedful_expand_backward(ctypes.byref(job))
    del held
    return d_x, *found


def _job(x: Tensor, weights: Weights, placement: Placement) -> tuple[ExpandJob, list[Tensor | None]]:
    """The arguments, and the tensors that must live as long."""
    x, flat = _readable(x), [None if w is None else w.contiguous() for w in weights]
    (batch, length, heads, size), conv1, lin1 = x.shape, weights[0], weights[4]
    assert conv1 is not None
    cos, sin = (None if c is None else c.contiguous() for c in (placement.cos, placement.sin))
    job = ExpandJob(
        batch=batch,
        length=length,
        heads=heads,
        sim_heads=conv1.shape[0],
        size=size,
        sim_size=0 if lin1 is None else lin1.shape[0],
        width=conv1.shape[2],
        threads=torch.get_num_threads(),
        norm_first=placement.norm_first,
        eps=placement.eps,
        x=address(x),
        cos=address(cos),
        sin=address(sin),
        rotation_stride=0 if cos is None or cos.shape[0] == 1 else cos.stride(0),
        parallel=pool(),
        **{name: address(weight) for name, weight in zip(EXPANSION_WEIGHTS, flat, strict=True)},
    )
    job.xs[:] = x.stride()[:3]
    return job, [x, cos, sin, *flat]


def _readable(x: Tensor) -> Tensor:
    """With its last axis side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check(handle: ctypes.CDLL, dtype: torch.dtype) -> tuple[dict[str, float], str]:
    """Run small cases against the reference.

    Returns:
        The largest error of each result relative to its largest value; why the build is refused, "" if it is not.
    """
    generator, worst = torch.Generator().manual_seed(0), {"expansion": 0.0, "gradients of the expansion": 0.0}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    for heads, wide, size, sim_size, width in ((2, 6, 10, 0, 3), (3, 9, 16, 24, 5), (4, 24, 12, 18, 1)):
        weights: list[Tensor | None] = [
            draw(wide, heads, width),
            draw(wide),
            draw(wide, wide, width),
            draw(wide),
        ]
        cos = sin = None
        if sim_size:
            weights += [draw(sim_size, size), draw(sim_size), draw(sim_size, sim_size), None, draw(sim_size)]
            angle = draw(1, 133, sim_size // 2)
            cos, sin = angle.cos(), angle.sin()
        weights += [None] * (len(EXPANSION_WEIGHTS) - len(weights))
        placement = Placement(weights[-1], 1e-5, cos, sin, width == 5)
        x, grad = draw(2, 133, heads, size), draw(2, wide, 133, sim_size or size)
        got = [run_expand(x, tuple(weights), placement, handle)]
        got += run_expand_backward(grad, x, tuple(weights), placement, True, True, handle)
        for i, error in enumerate(_errors(got, x, weights, placement, grad)):
            name = "gradients of the expansion" if i else "expansion"
            worst[name] = max(worst[name], error)
    wrong = [f"{name} by {error:.1g}" for name, error in worst.items() if not error <= ALLOWED[dtype]]
    return worst, f"its results are off: {', '.join(wrong)}" if wrong else ""


def _errors(
    got: list[Tensor], x: Tensor, weights: list[Tensor | None], placement: Placement, grad: Tensor
) -> list[float]:
    with torch.enable_grad():
        leaves = [None if w is None else w.double().requires_grad_() for w in (x, *weights)]
        wide_x, conv1, bias1, conv2, bias2, lin1, lin1_bias, lin2, lin2_bias, norm = leaves
        assert wide_x is not None and conv1 is not None and conv2 is not None
        out = simulate_heads(wide_x.transpose(1, 2), conv1, bias1, conv2, bias2)
        if lin1 is not None and lin2 is not None:
            cos, sin = (None if c is None else c.double() for c in (placement.cos, placement.sin))
            out = simulate_features(out, lin1, lin1_bias, lin2, lin2_bias)
            out = place(out, placement._replace(norm=norm, cos=cos, sin=sin))
        expected = [out, *torch.autograd.grad(out, [w for w in leaves if w is not None], grad.double())]
    found = [d for d, w in zip(got, (x, x, *weights), strict=True) if w is not None]
    return [
        float((a.double() - b.detach()).abs().max() / b.detach().abs().max())
        for a, b in zip(found, expected, strict=True)
    ]


check_with(check)

"""The check that a fresh build has to pass: outputs and gradients of small cases against the reference."""

import ctypes

import torch
from torch import Tensor

from heedful.ops.masks import rank_in_segment, visible_keys, voted_keys
from heedful.ops.selective.native.selective import run_backward, run_forward
from heedful.ops.selective.native.slots import run_slots
from heedful.ops.selective.reference import selective_reference

ALLOWED = {torch.float32: 2e-5, torch.float64: 1e-11}
"""Of the largest value."""
EARLIER = 3
"""Keys that have no query, and a start of F."""


def check(handle: ctypes.CDLL, dtype: torch.dtype) -> tuple[dict[str, float], str]:
    """Run small cases.

    Returns:
        The largest error of each result relative to its largest value; why the build is refused, "" if it is not.
    """
    worst: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for length, size, v_size, padded in ((5, 8, 8, False), (131, 16, 16, False), (230, 24, 40, True)):
        shapes = (
            (2, 4, length - EARLIER, size),
            (2, 2, length, size),
            (2, 2, length, v_size),
            (2, 1, EARLIER),
            (2, 4, length - EARLIER, v_size),
            (2, 1, length),
        )
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        drawn[3].abs_()
        key_mask = torch.arange(length).expand(2, -1) >= torch.tensor([[0], [7]]) if padded else None
        for name, error in _errors(handle, drawn, key_mask).items():
            worst[name] = max(worst.get(name, 0.0), error)
    wrong = {name: error for name, error in worst.items() if not error <= ALLOWED[dtype]}
    if not wrong:
        return worst, ""
    return worst, "its results are off: " + ", ".join(
        f"{name} by {error:.1g}" for name, error in wrong.items()
    )


def _errors(handle: ctypes.CDLL, drawn: list[Tensor], key_mask: Tensor | None) -> dict[str, float]:
    q, k, v, start, d_out, d_after = drawn
    scale, length = q.shape[-1] ** -0.5, k.shape[2]
    out, after, before, log_sum = run_forward(
        handle, q, k, v, None, None, start, key_mask, None, scale, scale, True
    )
    dq, dk, dv, _, _, d_start = run_backward(
        handle, q, k, v, None, None, key_mask, None, out, before, log_sum, d_out, d_after, scale, scale, True
    )
    got = [out, after, dq, dk, dv, d_start[..., :EARLIER]]
    if key_mask is None:  # one query more, over keys as slots
        votes, places = after[:, 0].clone(), torch.arange(length).expand(2, -1).contiguous()
        one, _ = run_slots(q[:, :, -1:], k, v, votes, places, places[:, -1:], scale, handle=handle)
        got += [one, votes]

    leaves = [x.double().requires_grad_() for x in (q, k, v, start)]
    wide_q, wide_k, wide_v, wide_start = leaves
    visible = visible_keys(q.shape[2], length, key_mask, None, q.device)
    voted = voted_keys(visible, rank_in_segment(length, key_mask, None, q.device))
    with torch.enable_grad():
        outs = selective_reference(wide_q, wide_k, wide_v, None, wide_start, visible, voted, scale)
        if key_mask is None:
            more = torch.ones(1, 1, length, dtype=torch.bool)
            may = (torch.arange(length) > 0) & (torch.arange(length) < length - 1)
            held = outs[1].detach()
            step = selective_reference(
                wide_q[:, :, -1:], wide_k, wide_v, None, held, more, may[None, None], scale
            )
        gradients = torch.autograd.grad(outs, leaves, [d_out.double(), d_after.double()])
    expected = [*outs, *gradients, *(step if key_mask is None else ())]
    names = ("output", "F", "gradient of q", "of k", "of v", "of F", "decoded output", "decoded F")[
        : len(got)
    ]
    return {
        name: float((a.double() - b.view_as(a).detach()).abs().max() / b.detach().abs().max())
        for name, a, b in zip(names, got, expected, strict=True)
    }

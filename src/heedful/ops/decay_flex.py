"""Attention with decay by FlexAttention, whose kernel makes the bias inside of it, for training on a GPU."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from heedful.ops.compiling import constant_result
from heedful.ops.decay import RunningSums
from heedful.ops.precision import no_autocast, to_autocast_dtype

DEVICES = ("cpu", "cuda", "xpu", "hpu", "mps")
"""Types of devices that PyTorch has it for; with gradients, here, CUDA alone."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SIZES = range(16, 257)
"""Features of a head that its kernel takes: no fewer, and as many as fit a GPU's shared memory."""


def flex_unavailable(q: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> str | None:
    """Why `attend_flex` cannot run these tensors, and what to do; None if it can.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D).
        v: (B, G, S, E).
        sums: the running sums, with a gradient if they need one.
    """
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, sums))
    if q.device.type not in DEVICES:
        return f"FlexAttention takes tensors on {', '.join(DEVICES)}, got {q.device}; use impl='sdpa'"
    if q.device.type != "cuda":
        if needs_gradient:
            return f"FlexAttention has gradients on NVIDIA GPUs alone, got tensors on {q.device}; use impl='sdpa'"
        return None
    if not _has_triton():
        return "FlexAttention needs triton; pip install triton, or use impl='sdpa'"
    dtype = v.dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    if dtype not in DTYPES:
        return f"on a GPU FlexAttention takes float16, bfloat16 and float32, got {dtype}; use impl='sdpa'"
    for size in (q.shape[-1], v.shape[-1]):
        if size not in SIZES:
            return (
                f"FlexAttention takes head sizes from {SIZES[0]} to {SIZES[-1]}, got {size}; use impl='sdpa'"
            )
    if needs_gradient and torch.are_deterministic_algorithms_enabled():
        return (
            "FlexAttention sums the gradient of the gates in any order, and deterministic algorithms were asked "
            "for; use impl='sdpa'"
        )
    return None


def flex_pays(q: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> bool:
    """Whether `auto` takes it: in training on a GPU.

    Its kernel is compiled for the lengths that it meets, some seconds each, which prompts of any length would be
    slow to pay back.
    """
    wanted = torch.is_grad_enabled() and q.requires_grad and q.device.type == "cuda"
    return wanted and flex_unavailable(q, k, v, sums) is None


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: RunningSums,
    earlier: Tensor | None,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """`softmax(L - D) v` over the visible keys.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D).
        v: (B, G, S, E).
        sums: of the steps of all keys.
        earlier: (B, H, S - T), the decay of keys of earlier calls, or None.
        visible: (1 or B, T, S) bool.
        scale: multiplies the logits.

    Returns:
        (B, H, T, E); zeros for a query that sees nothing.
    """
    length, n_keys, dtype = q.shape[2], k.shape[2], v.dtype
    q, k, v = to_autocast_dtype(q, k, v)  # type: ignore[assignment]
    queries, keys = sums.split(earlier, n_keys - length, n_keys)
    run = _compiled() if q.device.type == "cuda" and not torch.compiler.is_compiling() else _attend
    with no_autocast(q.device):
        return run(q.to(v.dtype), k.to(v.dtype), v, *queries, *keys, visible, scale).to(dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    high: Tensor,
    low: Tensor,
    key_high: Tensor,
    key_low: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """The mask by blocks and the attention, to be compiled together; numbers as in `RunningSums.split`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, n_keys = visible.shape[1:]
    # A row without any key would have no softmax: let it see everything, then drop it.
    alive = visible.any(-1, keepdim=True)
    seen, row = visible | ~alive, int(len(visible) > 1)

    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen[b * row, i, j]

    def less_decay(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        decay = (high[b, h, i] - key_high[b, h, j]) + (low[b, h, i] - key_low[b, h, j])
        return logit - decay

    mask = create_block_mask(is_seen, len(visible), None, length, n_keys, device=q.device)
    grouped = q.shape[1] != k.shape[1]
    out = flex_attention(q, k, v, score_mod=less_decay, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out.masked_fill(~alive[:, None], 0.0)


@cache
def _compiled() -> Any:
    return torch.compile(_attend)


@constant_result
def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None

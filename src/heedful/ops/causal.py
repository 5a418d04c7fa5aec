"""Causal softmax attention whose values may be narrower than the queries, as in SAS."""

import torch
from torch import Tensor

from heedful.ops.checks import check_choice
from heedful.ops.dot_product import attention_sdpa
from heedful.ops.native.library import preferred
from heedful.ops.selective.blocked import plain_blocked
from heedful.ops.selective.native.selective import plain_native

LONG = 256
"""Tokens from which tiles pay: below, PyTorch's kernel on padded values is faster."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, impl: str = "auto") -> Tensor:
    """`softmax(q k^T * scale) v` over the keys up to each query, never with all logits in memory.

    PyTorch's fused kernels need values as wide as the queries, so they are padded. On a CPU in float32 or float64
    the tiles of selective attention without its votes take them as they are, by the C++ operator if there is one.
    In 16 bits, where tiles are summed in float32, PyTorch's kernel is faster.

    Args:
        q: (B, H, T, D).
        k: (B, G, T, D); a single query may have earlier keys, (B, G, S, D).
        v: (B, G, T, E), likewise.
        scale: multiplies the logits.
        impl: "auto", or "sdpa" for PyTorch's kernel whatever the sizes.

    Returns:
        (B, H, T, E).
    """
    check_choice("impl", impl, ("auto", "sdpa"))
    kind = q.device.type
    narrow = impl != "sdpa" and v.shape[-1] < q.shape[-1] and q.shape[2] >= LONG
    if narrow and kind == "cpu" and q.dtype.itemsize >= 4 and not torch.is_autocast_enabled(kind):
        tiles = plain_native if preferred(kind, q.dtype) else plain_blocked
        return tiles(q, k, v, scale)
    # a plain bool, not `length > 1`: with a symbolic length that is no bool to the compiler
    return attention_sdpa(q, k, v, scale, causal=True if q.shape[2] > 1 else False)  # noqa: SIM210

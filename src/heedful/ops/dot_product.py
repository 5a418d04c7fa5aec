"""Plain softmax attention: the readable reference and PyTorch's fused kernel, with one signature."""

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.ops.precision import wide_dtype


def repeat_kv(x: Tensor, n_heads: int) -> Tensor:
    """(B, G, S, D) -> (B, H, S, D): each key/value head serves H // G neighbouring query heads."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def as_rows(q: Tensor, groups: int) -> Tensor:
    """(B, H, T, D) -> (B, G, H/G · T, D): the query heads of a key head as more queries, without copies of it."""
    return q if q.shape[1] == groups else q.unflatten(1, (groups, -1)).flatten(2, 3)


def masked_softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible keys; a row that sees no key gets zeros, and zero gradients, not NaN.

    Args:
        logits: (B, H, T, S).
        visible: bool, broadcastable to `logits`.
    """
    alive = visible.any(-1, keepdim=True)
    logits = logits.masked_fill(~visible & alive, -torch.inf)
    return logits.softmax(-1).masked_fill(~visible, 0.0)


def wide_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`q k^T * scale`, (B, H, T, S), float32 or wider, of q (B, H, T, D) and k (B, G, S, D)."""
    dtype, heads = wide_dtype(q), q.shape[1]
    logits = as_rows(q, k.shape[1]).to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    return logits.unflatten(2, (heads // k.shape[1], -1)).flatten(1, 2)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """`softmax(q k^T * scale) v` with every logit materialised.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D).
        v: (B, G, S, E).
        visible: (1 or B, T, S) bool.
        scale: multiplies the logits.

    Returns:
        (B, H, T, E).
    """
    dtype = wide_dtype(q)
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    return (masked_softmax(logits, visible[:, None]) @ v.to(dtype)).to(v.dtype)


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """`attention_reference` through `F.scaled_dot_product_attention`.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D).
        v: (B, G, S, E).
        scale: multiplies the logits.
        mask: (B, 1 or H, T, S), bool or an additive bias; every row must see at least one key.
        causal: the mask is the plain causal square, T == S.

    Returns:
        (B, H, T, E).
    """
    heads, length = q.shape[1:3]
    if length == 1:  # in a decoding step, copies of the keys would take several times as long as all else
        q = as_rows(q, k.shape[1])
        mask = mask if mask is None or mask.shape[1] == 1 else as_rows(mask, k.shape[1])
    else:
        k, v = repeat_kv(k, heads), repeat_kv(v, heads)
    size, wide = v.shape[-1], max(v.shape[-1], q.shape[-1])
    # Unequal head sizes, or features that lie apart, would drop SDPA to its slow path, which keeps all logits;
    # zeros and copies cost far less.
    q, k, v = (F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x for x in (q, k, v))
    if length > 1:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out[..., :size].reshape(q.shape[0], heads, length, size)

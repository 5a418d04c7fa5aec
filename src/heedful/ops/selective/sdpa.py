"""Selective attention with F as the additive bias of PyTorch's scaled_dot_product_attention."""

import torch
from torch import Tensor

from heedful.ops.dot_product import attention_sdpa
from heedful.ops.precision import wide_dtype
from heedful.ops.selective.reference import per_head, soft_masks


def selective_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: tuple[Tensor, Tensor, float] | None,
    soft_mask: Tensor | None,
    visible: Tensor,
    voted: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Same result as `selective_reference`; only the selection heads' logits are materialised."""
    # bf16 inputs are computed in fp32: a bf16 bias would be off by whole units where F is large.
    dtype = wide_dtype(q)
    q, k, wide_v = q.to(dtype), k.to(dtype), v.to(dtype)
    select_q, select_k, select_scale = select or (q[:, :1], k[:, :1], scale)
    select_logits = select_q.to(dtype) @ select_k.to(dtype).transpose(-1, -2) * select_scale
    masks = soft_masks(select_logits, soft_mask, voted)
    seen, alive = visible[:, None], visible.any(-1)[:, None, :, None]
    # A row without any key would be NaN, in its gradient too: let it see everything, then drop it.
    bias = (-per_head(masks[:, :, :-1], q.shape[1])).masked_fill(~seen & alive, -torch.inf)
    bias = bias.expand(-1, q.shape[1], -1, -1)
    out = attention_sdpa(q, k, wide_v, scale, mask=bias)
    # A copy: a view in a cache would keep all T rows of F alive.
    return out.masked_fill(~alive, 0.0).to(v.dtype), masks[:, :, -1].clone()

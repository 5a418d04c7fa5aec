"""The memory loss of selective attention: how much of a text a layer keeps at its worst moment."""

import torch
from torch import Tensor


def memory_share(
    counts: Tensor, *, key_mask: Tensor | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """The largest number of tokens held while reading a row, as a share of its tokens.

    `max_i M_i / n` of the memory loss (Leviathan et al., arXiv 2410.02703, section 5), with M from
    `unmasked_count`. Of packed documents each has its own maximum; their sum is divided by the tokens of the
    row, so that a document counts by its length.

    Args:
        counts: (B, R, T) from `unmasked_count`.
        key_mask: (B, T) bool, False = padding, which does not count.
        segment_ids: (B, T) integers.

    Returns:
        (B, R), between 0 and 1; 0 for a row of padding. Differentiable.
    """
    if segment_ids is None:
        peaks = counts.amax(-1)
    else:
        index = _ordinals(segment_ids)[:, None].expand_as(counts)
        peaks = torch.zeros_like(counts).scatter_reduce(-1, index, counts, "amax").sum(-1)
    if key_mask is None:
        return peaks / counts.shape[-1]
    return peaks / key_mask.sum(-1, keepdim=True).clamp(min=1)


def _ordinals(ids: Tensor) -> Tensor:
    """Segment ids (B, T) numbered 0, 1, ... per row, without asking how many there are."""
    ordered, order = ids.sort(dim=-1)
    starts = torch.zeros_like(order)
    starts[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
    return torch.empty_like(order).scatter_(-1, order, starts.cumsum(-1))

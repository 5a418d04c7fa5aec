"""Padding and segments as one number per token, which is all that a kernel needs to know of them."""

import torch
from torch import Tensor

from heedful.ops.masks import rank_in_segment


def token_codes(n_keys: int, key_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
    """-1 for padding, else twice the number of the token's segment, plus 1 on the segment's first real token.

    Args:
        n_keys: S.
        key_mask: (B, S) bool or None.
        segment_ids: (B, S) integers of any size, or None.

    Returns:
        (B, S) int32, or None where all tokens are real and of one segment.
    """
    given = key_mask if segment_ids is None else segment_ids
    if given is None:
        return None
    first = rank_in_segment(n_keys, key_mask, segment_ids, given.device) == 0
    number = torch.zeros(given.shape, dtype=torch.int32, device=given.device)
    if segment_ids is not None:
        ids, order = segment_ids.sort(dim=-1)
        starts = torch.zeros_like(number)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        number.scatter_(-1, order, starts.cumsum(-1, dtype=torch.int32))
    code = number * 2 + first
    return code if key_mask is None else code.masked_fill(~key_mask, -1)

"""Packed documents, however a collator marks them, as segment ids."""

import torch
from torch import Tensor


def one_segment_each(segment_ids: Tensor, shape: tuple[int, int]) -> bool:
    """Whether sound segment ids, (B, T) integers, say nothing: every row is one document."""
    sound = tuple(segment_ids.shape) == shape and segment_ids.dtype in (torch.int32, torch.int64)
    if not sound or torch.compiler.is_compiling():
        return False
    return bool((segment_ids == segment_ids[:, :1]).all())


def segments_of(position_ids: Tensor, batch: int) -> Tensor | None:
    """Segment ids (B, T) of packed documents, whose positions start over; None where none do."""
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not torch.compiler.is_compiling() and not bool(breaks.any()):
        return None
    segments = torch.nn.functional.pad(breaks.long().cumsum(-1), (1, 0))
    return segments.expand(batch, -1)


def segments_of_lengths(
    cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor | None, batch: int, length: int
) -> Tensor:
    """Segment ids (1, T) of the documents of one row that end where `cu_seq_lens_q` says.

    Args:
        cu_seq_lens_q: (documents + 1,) integers that rise from 0 to T.
        cu_seq_lens_k: the same, or None.
        batch: rows; flash attention's lengths know one.
        length: T.

    Raises:
        ValueError: for several rows, lengths of keys that are not those of queries, or an end that is not T.
    """
    if batch != 1:
        raise ValueError(
            f"cu_seq_lens_q describes one row of packed documents, got {batch} rows; give segment_ids (B, T)"
        )
    if cu_seq_lens_k is not None and not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be equal: documents attend to themselves")
    ends = cu_seq_lens_q.long()
    if ends.ndim != 1 or int(ends[0]) != 0 or int(ends[-1]) != length:
        raise ValueError(f"cu_seq_lens_q must rise from 0 to the {length} tokens, got {ends.tolist()}")
    places = torch.arange(length, device=ends.device)
    return torch.searchsorted(ends, places, right=True)[None]

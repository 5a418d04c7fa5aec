"""Documents of any length as rows of one length, with nothing padded in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE = -100
"""The label of a position that no loss is computed on."""


def pack(
    documents: Sequence[Sequence[int]], context: int, bos: int, *, stride: int | None = None
) -> dict[str, Tensor]:
    """Concatenate documents, each preceded by `bos`, and cut the stream into rows.

    Row r holds the tokens from `r * stride` on. With `stride == context` (the default, for
    training) rows are disjoint and a last row shorter than `context` is dropped. With a smaller
    stride (for validation; `context - 1` is the cheapest) rows overlap, the last one is padded,
    and every token of the stream but the first is predicted exactly once. A `bos` between two
    documents is predicted too: it plays end of text.

    Args:
        documents: token ids of each document.
        context: row length in tokens, at least 2.
        bos: id of the token before every document; it also fills the padding.
        stride: tokens between the starts of neighbouring rows, 1 to `context`.

    Returns:
        int64 tensors of shape (rows, context):
        `input_ids`;
        `segment_ids`, the document of each token, numbered from 0 in every row (padding is a
        document of its own);
        `labels`, equal to `input_ids` where a token is predicted and -100 elsewhere. The model
        shifts: `labels[:, i]` is predicted from position i - 1, and column 0 is always -100.

    Raises:
        ValueError: an argument out of range, or too few tokens for a single row.
    """
    stride = context if stride is None else stride
    if context < 2:
        raise ValueError(f"context must be at least 2 (to predict one token), got {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be between 1 and context ({context}), got {stride}")
    stream, document = _stream(documents, bos)
    keep_all = stride < context
    needed = 2 if keep_all else context
    if len(stream) < needed:
        raise ValueError(
            f"one row needs {needed} tokens, but the text has {len(stream)}; "
            f"use {'' if keep_all else 'a smaller --context or '}more text"
        )

    labels = stream
    if keep_all:
        missing = context - len(stream)
        padding = missing if missing > 0 else missing % stride
        stream = _extend(stream, padding, bos)
        document = _extend(document, padding, len(documents))
        labels = _extend(labels, padding, IGNORE)
    input_ids = stream.unfold(0, context, stride).clone()  # (rows, context)
    segment_ids = document.unfold(0, context, stride).clone()
    segment_ids -= segment_ids[:, :1].clone()
    labels = labels.unfold(0, context, stride).clone()
    labels[:, 0] = IGNORE
    # The columns that a row shares with the row before were predicted there.
    labels[1:, : context - stride] = IGNORE
    return {"input_ids": input_ids, "segment_ids": segment_ids, "labels": labels}


def by_document(documents: Sequence[Sequence[int]], context: int, bos: int) -> dict[str, Tensor]:
    """Rows that never mix documents, for a cache that evicts: it holds one text per row.

    A document longer than a row goes on in the next one, which begins with the last token of the row
    before. Every token is predicted exactly once, and after every document but the last its end: the same
    targets as `pack(..., stride=context - 1)`.

    Args:
        documents: token ids of each document.
        context: row length in tokens, at least 2.
        bos: id of the token before every document; it also fills the padding, on the right.

    Returns:
        int64 tensors of shape (rows, context): `input_ids`; `attention_mask`, 0 = padding; `labels`, -100
        where nothing is predicted, to be shifted by the model.

    Raises:
        ValueError: an argument out of range, or no token to predict.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2 (to predict one token), got {context}")
    columns: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for number, document in enumerate(documents):
        end = [bos] if number < len(documents) - 1 else []
        stream = torch.tensor([bos, *document, *end], dtype=torch.long)
        for start in range(0, len(stream) - 1, context - 1):
            piece = stream[start : start + context]
            missing = context - len(piece)
            labels = piece.clone()
            labels[0] = IGNORE
            columns["input_ids"].append(_extend(piece, missing, bos))
            columns["attention_mask"].append(_extend(torch.ones_like(piece), missing, 0))
            columns["labels"].append(_extend(labels, missing, IGNORE))
    if not columns["labels"]:
        raise ValueError("the text has no token to predict; give a longer one")
    return {name: torch.stack(rows) for name, rows in columns.items()}


def count_bytes(labels: Tensor, token_bytes: Tensor) -> int:
    """UTF-8 bytes that the predicted tokens of `labels` (rows, context) stand for.

    `token_bytes` (vocab,) comes from `heedful.data.token_bytes`. The sum of the losses in bits
    divided by this number is bits per byte.
    """
    predicted = labels[:, 1:]
    return int(token_bytes[predicted[predicted != IGNORE]].sum())


def _stream(documents: Sequence[Sequence[int]], bos: int) -> tuple[Tensor, Tensor]:
    """All tokens in order and the number of the document of each, both of shape (tokens,)."""
    tokens: list[int] = []
    for document in documents:
        tokens.append(bos)
        tokens.extend(document)
    lengths = torch.tensor([len(document) + 1 for document in documents], dtype=torch.long)
    numbers = torch.arange(len(documents)).repeat_interleave(lengths)
    return torch.tensor(tokens, dtype=torch.long), numbers


def _extend(values: Tensor, count: int, fill: int) -> Tensor:
    return torch.cat([values, values.new_full((count,), fill)])

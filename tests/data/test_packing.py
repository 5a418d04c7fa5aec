"""Packing: rows give the stream back, and validation predicts every token exactly once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heedful.data import count_bytes, pack
from heedful.data.packing import IGNORE, by_document

BOS = 99
DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=20), min_size=1, max_size=8)


def stream_of(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in [BOS, *document]]


def test_training_example():
    rows = pack([[1, 2], [3], [4, 5, 6]], context=4, bos=BOS)
    assert rows["input_ids"].tolist() == [[BOS, 1, 2, BOS], [3, BOS, 4, 5]]
    assert rows["segment_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert rows["labels"].tolist() == [[IGNORE, 1, 2, BOS], [IGNORE, BOS, 4, 5]]


def test_validation_example():
    rows = pack([[1, 2], [3], [4, 5, 6]], context=4, bos=BOS, stride=3)
    assert rows["input_ids"].tolist() == [[BOS, 1, 2, BOS], [BOS, 3, BOS, 4], [4, 5, 6, BOS]]
    assert rows["segment_ids"].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert rows["labels"].tolist() == [
        [IGNORE, 1, 2, BOS],
        [IGNORE, 3, BOS, 4],
        [IGNORE, 5, 6, IGNORE],
    ]


@given(DOCUMENTS, st.integers(2, 12))
def test_disjoint_rows_concatenate_to_the_stream(documents, context):
    stream = stream_of(documents)
    if len(stream) < context:
        return
    rows = pack(documents, context, BOS)
    count = len(stream) // context
    assert rows["input_ids"].shape == (count, context)
    assert rows["input_ids"].flatten().tolist() == stream[: count * context]


@given(DOCUMENTS, st.integers(2, 12), st.data())
def test_overlapping_rows_predict_every_token_once(documents, context, data):
    stream = stream_of(documents)
    stride = data.draw(st.integers(1, context - 1))
    if len(stream) < 2:
        return
    rows = pack(documents, context, BOS, stride=stride)
    predicted = torch.zeros(len(stream), dtype=torch.long)
    for row in range(len(rows["input_ids"])):
        for column in range(context):
            at = row * stride + column
            token = rows["input_ids"][row, column].item()
            label = rows["labels"][row, column].item()
            assert token == (stream[at] if at < len(stream) else BOS)
            if label != IGNORE:
                assert column > 0 and label == stream[at]
                predicted[at] += 1
    assert predicted.tolist() == [0] + [1] * (len(stream) - 1)


@given(DOCUMENTS, st.integers(2, 12), st.booleans())
def test_segments_start_at_zero_and_change_at_every_bos(documents, context, keep_all):
    stream = stream_of(documents)
    if len(stream) < context:
        return
    rows = pack(documents, context, BOS, stride=context - keep_all)
    padded = len(stream) - (len(rows["input_ids"]) - 1) * (context - keep_all)
    for row, (tokens, segments) in enumerate(
        zip(rows["input_ids"].tolist(), rows["segment_ids"].tolist(), strict=True)
    ):
        real = padded if row == len(rows["input_ids"]) - 1 else context
        expected = [0]
        for column in range(1, context):
            new = column == real or (column < real and tokens[column] == BOS)
            expected.append(expected[-1] + new)
        assert segments == expected


def test_everything_is_int64_and_owns_its_memory():
    for tensor in pack([[1] * 20], 8, BOS, stride=7).values():
        assert tensor.dtype == torch.long
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_validation_shorter_than_a_row_is_padded():
    rows = pack([[1]], context=5, bos=BOS, stride=4)
    assert rows["input_ids"].tolist() == [[BOS, 1, BOS, BOS, BOS]]
    assert rows["segment_ids"].tolist() == [[0, 0, 1, 1, 1]]
    assert rows["labels"].tolist() == [[IGNORE, 1, IGNORE, IGNORE, IGNORE]]


def test_too_little_text_to_train_on():
    with pytest.raises(ValueError, match=r"needs 64 tokens, but the text has 4; .*smaller --context"):
        pack([[1, 2, 3]], context=64, bos=BOS)


@pytest.mark.parametrize("documents", [[], [[]]], ids=["nothing", "one empty document"])
def test_too_little_text_to_measure_on(documents):
    with pytest.raises(ValueError, match=r"needs 2 tokens, but the text has [01]; use more text"):
        pack(documents, context=8, bos=BOS, stride=7)


def test_context_too_small():
    with pytest.raises(ValueError, match=r"context must be at least 2 .* got 1"):
        pack([[1, 2]], context=1, bos=BOS)


@pytest.mark.parametrize("stride", [0, -1, 5])
def test_stride_out_of_range(stride):
    with pytest.raises(ValueError, match=rf"stride must be between 1 and context \(4\), got {stride}"):
        pack([[1, 2, 3, 4]], context=4, bos=BOS, stride=stride)


def test_count_bytes_skips_the_first_column_and_ignored_labels():
    token_bytes = torch.tensor([0, 1, 3])
    labels = torch.tensor([[2, 1, 2], [2, IGNORE, 0]])
    assert count_bytes(labels, token_bytes) == 4
    assert count_bytes(torch.full((2, 3), IGNORE), token_bytes) == 0


def test_rows_by_document_predict_what_packed_rows_predict():
    documents = [[5, 6, 7, 8, 9, 10], [11], [], [12] * 9]
    apart = by_document(documents, 4, bos=1)
    together = pack(documents, 4, 1, stride=3)

    def targets(rows):
        labels = rows["labels"][:, 1:]
        return labels[labels != -100].tolist()

    assert targets(apart) == targets(together)
    real = apart["attention_mask"].bool()
    assert (apart["labels"][~real] == -100).all()
    assert (apart["input_ids"][~real] == 1).all()
    # a row begins with the start of a document, or with the last token of the row before
    assert apart["input_ids"][:, 0].tolist() == [1, 7, 10, 1, 1, 1, 12, 12]


def test_rows_by_document_need_something_to_predict():
    with pytest.raises(ValueError, match="no token to predict"):
        by_document([[]], 4, bos=1)
    with pytest.raises(ValueError, match="context must be at least 2"):
        by_document([[3, 4]], 1, bos=1)

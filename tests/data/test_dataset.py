"""load_data: rows, sizes and byte counts for every kind of data and tokenizer."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from heedful.data import (
    ByteTokenizer,
    TokenDataset,
    byte_tokenizer,
    load_data,
    load_text,
    train_bpe,
)
from heedful.data.dataset import HELD_OUT_SEEDS, SYNTHETIC_VALIDATION_SEED

TASK = "synthetic:variable-assignment"


@pytest.fixture
def small(tmp_path):
    """A file of 60 paragraphs, some of them not ASCII."""
    file = tmp_path / "small.txt"
    file.write_text("\n\n".join(f"Paragraph {i}: très joli, № {i * i}." for i in range(60)), "utf-8")
    return file


def test_token_dataset():
    tensors = {"input_ids": torch.arange(6).view(3, 2), "labels": torch.ones(3, 2)}
    dataset = TokenDataset(tensors)
    assert len(dataset) == 3
    assert list(dataset[1]) == ["input_ids", "labels"]
    assert dataset[1]["input_ids"].tolist() == [2, 3]
    assert len(list(torch.utils.data.DataLoader(dataset, batch_size=2))) == 2


@pytest.mark.parametrize("tensors", [{}, {"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}])
def test_token_dataset_needs_equal_lengths(tensors):
    with pytest.raises(ValueError, match="same number of rows, got"):
        TokenDataset(tensors)


def test_austen_with_bpe():
    pytest.importorskip("transformers")
    data = load_data("austen")
    assert (data.name, data.kind, data.vocab_size, data.context) == ("austen", "text", 2048, 256)
    assert len(data.tokenizer) == 2048
    assert data.bos_token_id == data.tokenizer.bos_token_id
    assert data.validation_bytes == 464_350  # Persuasion, to the last byte
    assert {name: len(row) for name, row in data.train[0].items()} == {
        "input_ids": 256,
        "segment_ids": 256,
        "labels": 256,
    }
    assert data.train[0]["input_ids"][0] == data.bos_token_id
    start = data.tokenizer.decode(data.train[0]["input_ids"][1:])
    assert load_text().train[0].startswith(start)
    assert "111 documents (1,354,347 bytes)" in data.description
    assert "\n" not in data.description


@pytest.mark.parametrize("kind", ["bpe", "bytes", "plain bytes", "built"])
def test_every_validation_byte_is_counted(small, kind):
    if kind != "plain bytes":
        pytest.importorskip("transformers")
    tokenizer = kind
    if kind == "plain bytes":
        tokenizer = ByteTokenizer()
    elif kind == "built":
        tokenizer = train_bpe(["Paragraph très joli"] * 2, 300)
    data = load_data(small, tokenizer=tokenizer, vocab_size=280, context=16)
    text = load_text(small)
    assert data.validation_bytes == sum(len(part.encode()) for part in text.validation)
    assert data.vocab_size == len(data.tokenizer)
    assert data.name == "small.txt"
    largest = max(data.train.tensors["input_ids"].max(), data.validation.tensors["input_ids"].max())
    assert largest < data.vocab_size
    assert "segment_ids" in data.validation[0]


def test_built_tokenizer_is_used_as_it_is(small):
    pytest.importorskip("transformers")
    tokenizer = train_bpe(["Paragraph très joli"] * 2, 300)
    data = load_data(small, tokenizer=tokenizer, vocab_size=1000, context=16)
    assert data.tokenizer is tokenizer
    assert data.vocab_size == len(tokenizer)


def test_bpe_never_sees_the_validation_text(tmp_path):
    pytest.importorskip("transformers")
    train = tmp_path / "train.txt"
    train.write_text("abcd " * 200)
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("wxyz " * 200)
    data = load_data(train, validation=held_out, context=16)
    vocab = data.tokenizer.get_vocab()
    assert "abcd" in vocab
    assert "wxyz" not in vocab and "wx" not in vocab


def test_train_examples_keeps_the_first_rows(small):
    full, part = (
        load_data(small, tokenizer=ByteTokenizer(), context=16, train_examples=n) for n in (None, 3)
    )
    assert len(part.train) == 3
    assert torch.equal(part.train.tensors["input_ids"], full.train.tensors["input_ids"][:3])
    assert len(part.validation) == len(full.validation)


def test_synthetic():
    data = load_data(TASK, train_examples=100, seed=1)
    assert (data.name, data.kind) == (TASK, "variable-assignment")
    assert (data.context, data.vocab_size, data.bos_token_id) == (97, 17, 0)
    assert data.tokenizer is None and data.validation_bytes is None
    assert (len(data.train), len(data.validation)) == (100, 512)
    assert list(data.train[0]) == ["input_ids", "labels"]


def test_synthetic_default_size():
    assert len(load_data(TASK).train) == 20_000


def test_synthetic_seed_changes_training_but_not_validation():
    one, other = (load_data(TASK, train_examples=50, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.train.tensors["input_ids"], other.train.tensors["input_ids"])
    assert torch.equal(one.validation.tensors["input_ids"], other.validation.tensors["input_ids"])


@pytest.mark.parametrize("ahead", [0, 2, 4, 2**32, -(2**32)])
def test_no_seed_trains_on_what_is_held_out(ahead):
    """Copy, sorting and parity draw the same first rows however many there are."""
    seed = SYNTHETIC_VALIDATION_SEED + ahead
    for task in ("copy", "sorting", "parity", "variable-assignment"):
        with pytest.raises(ValueError, match=f"seed {seed} draws sequences that are held out.*another seed"):
            load_data(f"synthetic:{task}", train_examples=600, seed=seed)
    data = load_data("synthetic:copy", train_examples=600, seed=seed - 1 if ahead <= 0 else 0)
    rows = (
        {tuple(row) for row in part.tensors["input_ids"].tolist()} for part in (data.train, data.validation)
    )
    assert set.isdisjoint(*rows)


def test_the_seeds_of_longer_held_out_sequences_are_kept_for_them():
    pytest.importorskip("transformers")
    from heedful.training.run import LENGTHS

    assert all(SYNTHETIC_VALIDATION_SEED + times in HELD_OUT_SEEDS for times in LENGTHS)


def test_synthetic_fits_a_shorter_context():
    data = load_data(TASK, train_examples=5, context=33)
    assert data.context == data.train[0]["input_ids"].numel() == 31


def test_data_is_frozen():
    data = load_data(TASK, train_examples=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"


@pytest.mark.parametrize("name", ["synthetic", "synthetic:", "synthetic:variable"])
def test_unknown_synthetic_task(name):
    with pytest.raises(ValueError, match="expected one of: synthetic:variable-assignment"):
        load_data(name)


def test_synthetic_context_too_short():
    with pytest.raises(ValueError, match=r"context must be at least 7 .* got 6"):
        load_data(TASK, context=6)


def test_synthetic_draws_its_own_validation():
    with pytest.raises(ValueError, match="validation austen does not apply"):
        load_data(TASK, validation="austen")


def test_unknown_tokenizer():
    with pytest.raises(ValueError, match="must be one of bpe, chars, bytes or a tokenizer object, got 'w'"):
        load_data("austen", tokenizer="w")


def test_tokenizer_without_bos(small):
    pytest.importorskip("transformers")
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="has no bos_token"):
        load_data(small, tokenizer=tokenizer)


def test_context_longer_than_the_text(small):
    with pytest.raises(ValueError, match="one row needs 100000 tokens"):
        load_data(small, tokenizer=ByteTokenizer(), context=100_000)


@pytest.mark.parametrize("data", ["austen", TASK])
def test_train_examples_must_be_positive(data):
    with pytest.raises(ValueError, match="train_examples must be at least 1, got 0"):
        load_data(data, train_examples=0)


def test_import_and_plain_bytes_need_no_optional_package(small):
    code = (
        "import sys; import heedful.data as d\n"
        "assert not {'transformers', 'tokenizers', 'datasets'} & set(sys.modules)\n"
        "sys.modules['transformers'] = sys.modules['tokenizers'] = None\n"
        f"d.load_data({str(small)!r}, tokenizer=d.ByteTokenizer(), context=16)\n"
    )
    path = [entry for entry in sys.path if entry]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr

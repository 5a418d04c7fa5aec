"""One call from the name of some data to rows that a model trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from heedful.data.packing import count_bytes, pack
from heedful.data.reading import TEXT_COLUMN
from heedful.data.tasks import task_of
from heedful.data.tasks.task import BOS, Task
from heedful.data.text import Text, load_text
from heedful.data.tokenizer import (
    ByteTokenizer,
    byte_tokenizer,
    char_tokenizer,
    encode_documents,
    token_bytes,
    train_bpe,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZERS = ("bpe", "chars", "bytes")

SYNTHETIC_TRAIN_EXAMPLES = 20_000
SYNTHETIC_VALIDATION_EXAMPLES = 512
# Fixed, so that runs of every training seed are scored on the same sequences.
SYNTHETIC_VALIDATION_SEED = 1_000_000_007
HELD_OUT_SEEDS = range(SYNTHETIC_VALIDATION_SEED, SYNTHETIC_VALIDATION_SEED + 16)
"""That seed, and those after it, of longer held-out sequences: nobody trains on theirs."""
SEEDS = 2**32
"""Seeds that differ; of a larger one PyTorch's generator reads what is left."""


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Rows of equally long tensors: item i is the i-th row of each, as a dict of 1-D tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        """Keep `tensors`, each of shape (rows, tokens).

        Raises:
            ValueError: there are none, or their numbers of rows differ.
        """
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"expected tensors with the same number of rows, got {lengths}")
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def digest(self) -> str:
        """SHA-256 of all tensors and their names."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """Everything that training and evaluation need to know about some data."""

    name: str
    """`austen`, the name of a file or folder, or `synthetic:<task>`."""
    kind: str
    """`text`, or the name of the synthetic task."""
    train: TokenDataset
    """Rows to train on: input_ids, labels and, for text, segment_ids."""
    validation: TokenDataset
    """Rows to measure on, with the same keys; for text every token is predicted exactly once."""
    tokenizer: PreTrainedTokenizerFast | ByteTokenizer | None
    """The tokenizer of a text; None for a synthetic task."""
    vocab_size: int
    """Number of token ids."""
    context: int
    """Tokens in a row."""
    bos_token_id: int | None
    """Id of the token that begins every document or sequence."""
    validation_bytes: int | None
    """UTF-8 bytes that the predicted validation tokens stand for; None for a synthetic task."""
    description: str
    """One line for people."""
    task: Task | None = None
    """The synthetic task; None for a text."""

    def digest(self) -> str:
        """Of what is trained and measured on: two runs with another digest are not of the same data."""
        return f"{self.train.digest()[:16]}-{self.validation.digest()[:16]}"


def load_data(
    data: str | Path = "austen",
    *,
    validation: str | Path | None = None,
    text_column: str = TEXT_COLUMN,
    tokenizer: str | PreTrainedTokenizerFast | ByteTokenizer = "bpe",
    vocab_size: int = 2048,
    context: int = 256,
    seed: int = 0,
    train_examples: int | None = None,
    task_options: Mapping[str, Any] | None = None,
) -> Data:
    """Load, tokenize and pack a text, or draw a synthetic task.

    Args:
        data: `"austen"`, a file or a folder (see `load_text`), or
            `"synthetic:NAME"` for a task of `heedful.data.TASKS`.
        validation: text to measure on, in the same forms; text only. None holds some out.
        text_column: which column of a table (.jsonl, .csv, .parquet, ...) holds the texts.
        tokenizer: `"bpe"` or `"chars"` (made here of the training documents alone), `"bytes"`, or a
            tokenizer already built, such as the one saved with a model; text only.
        vocab_size: largest vocabulary of `"bpe"`; other tokenizers have their own.
        context: tokens in a row. A synthetic sequence has the task's own length, or less where `context`
            is smaller.
        seed: seed of the synthetic training sequences, but none of `HELD_OUT_SEEDS`; a text does not depend on it.
        train_examples: number of training rows. None is all rows of a text and 20,000
            synthetic sequences; a number keeps the first rows of a text.
        task_options: options of a synthetic task.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: an unknown name, an argument out of range, or a text that cannot be used.
        ImportError: a named tokenizer without transformers and tokenizers, a table without `datasets`.
    """
    if train_examples is not None and train_examples < 1:
        raise ValueError(f"train_examples must be at least 1, got {train_examples}")
    task = task_of(str(data), dict(task_options or {}))
    if task is not None:
        if validation is not None:
            raise ValueError(
                f"validation {validation} does not apply to {data}, which draws its own; leave it out"
            )
        if text_column != TEXT_COLUMN:
            raise ValueError(f"--text-column {text_column} does not apply to {data}; leave it out")
        return _load_synthetic(task, context, seed, train_examples)
    if isinstance(tokenizer, str) and tokenizer not in TOKENIZERS:
        raise ValueError(
            f"tokenizer must be one of {', '.join(TOKENIZERS)} or a tokenizer object, got {tokenizer!r}"
        )
    text = load_text(data, validation, column=text_column)
    return _pack_text(text, tokenizer, vocab_size, context, train_examples)


def _pack_text(
    text: Text,
    tokenizer: str | PreTrainedTokenizerFast | ByteTokenizer,
    vocab_size: int,
    context: int,
    train_examples: int | None,
) -> Data:
    if tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    elif tokenizer == "chars":
        tokenizer = char_tokenizer(text.train)
    elif isinstance(tokenizer, str):
        tokenizer = train_bpe(text.train, vocab_size)
    bos = tokenizer.bos_token_id
    if bos is None:
        raise ValueError("the tokenizer has no bos_token, which every document begins with; set it")

    train_ids = encode_documents(tokenizer, text.train)
    validation_ids = encode_documents(tokenizer, text.validation)
    train_rows = pack(train_ids, context, bos)
    # Neighbouring rows share one token, so that a row's first token is predicted by the row before.
    validation_rows = pack(validation_ids, context, bos, stride=context - 1)
    train = {name: tensor[:train_examples] for name, tensor in train_rows.items()}
    validation_bytes = count_bytes(validation_rows["labels"], token_bytes(tokenizer))
    return Data(
        name=text.name,
        kind="text",
        train=TokenDataset(train),
        validation=TokenDataset(validation_rows),
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        context=context,
        bos_token_id=bos,
        validation_bytes=validation_bytes,
        description=(
            f"{text.name}: train {_amount(text.train, train_ids)}; "
            f"validation {_amount(text.validation, validation_ids)}; "
            f"vocabulary {len(tokenizer):,}, rows of {context:,}"
        ),
    )


def _load_synthetic(task: Task, context: int, seed: int, train_examples: int | None) -> Data:
    if seed % SEEDS in HELD_OUT_SEEDS:
        raise ValueError(
            f"seed {seed} draws sequences that are held out (as {HELD_OUT_SEEDS[0]} to {HELD_OUT_SEEDS[-1]} do): "
            f"a model of {task.name} would be measured on what it was trained on; use another seed"
        )
    task, name = task.fit(context), f"synthetic:{task.name}"
    examples = train_examples or SYNTHETIC_TRAIN_EXAMPLES
    return Data(
        name=name,
        kind=task.name,
        train=TokenDataset(task.draw(examples, seed)),
        validation=TokenDataset(task.draw(SYNTHETIC_VALIDATION_EXAMPLES, SYNTHETIC_VALIDATION_SEED)),
        tokenizer=None,
        vocab_size=task.vocab_size,
        context=task.length,
        bos_token_id=BOS,
        validation_bytes=None,
        description=(
            f"{name}: train {examples:,} sequences; validation {SYNTHETIC_VALIDATION_EXAMPLES:,} sequences; "
            f"{task}: {task.length} tokens each, vocabulary {task.vocab_size}"
        ),
        task=task,
    )


def _amount(documents: list[str], ids: list[list[int]]) -> str:
    tokens = sum(map(len, ids))
    size = sum(len(document.encode("utf-8")) for document in documents)
    return f"{tokens:,} tokens of {len(documents):,} documents ({size:,} bytes)"

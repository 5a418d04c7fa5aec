"""Tokenizers of bytes and of characters: every string has a token sequence and comes back unchanged.

The one special token, `<|endoftext|>`, starts every document. Text never produces it: a marker
written inside a document is encoded as the ordinary characters it is made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
MIN_VOCAB_SIZE = BYTES + 1
_SPELLED_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class ByteTokenizer:
    """UTF-8 bytes as tokens, in plain Python: ids 0-255 are the bytes, 256 is `<|endoftext|>`."""

    vocab_size = MIN_VOCAB_SIZE
    bos_token_id = eos_token_id = BYTES

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """One id per UTF-8 byte; never 256."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; broken UTF-8 becomes U+FFFD, 256 becomes `<|endoftext|>`.

        Raises:
            ValueError: an id is outside 0-256.
        """
        pieces = []
        for is_special, group in groupby(ids, key=lambda token: token == BYTES):
            run = list(group)
            if is_special:
                pieces.append(END_OF_TEXT * len(run))
                continue
            if wrong := [token for token in run if not 0 <= token < BYTES]:
                raise ValueError(f"token ids must be in 0-{BYTES}, got {wrong[0]}")
            pieces.append(bytes(run).decode("utf-8", errors="replace"))
        return "".join(pieces)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """`ByteTokenizer` as a Hugging Face tokenizer with the same ids: byte-level BPE, no merges.

    Raises:
        ImportError: transformers or tokenizers is missing.
    """
    _require_lm()
    from tokenizers import Tokenizer, models

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    vocab[END_OF_TEXT] = BYTES
    # The pattern that separates words is of no use where nothing merges.
    return _wrap_bytes(Tokenizer(models.BPE(vocab=vocab, merges=[])), split_words=False)


def train_bpe(documents: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `documents` alone; the same documents give the same tokenizer.

    `len(tokenizer)` is the size reached: smaller than `vocab_size` when the text has too few
    repetitions to fill it.

    Raises:
        ValueError: `vocab_size` is below 257 (the bytes and `<|endoftext|>`).
        ImportError: transformers or tokenizers is missing.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT}), got {vocab_size}"
        )
    _require_lm()
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    return _wrap_bytes(core, split_words=True)


def char_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """Every character of `documents` as a token; other characters are spelled in their UTF-8 bytes.

    Ids 0-255 are bytes, 256 is `<|endoftext|>`, the characters follow in the order of Unicode, so that no text
    is lost, whatever is read later.

    Raises:
        ImportError: transformers or tokenizers is missing.
    """
    _require_lm()
    from tokenizers import Tokenizer, decoders, models

    tokens = [f"<0x{byte:02X}>" for byte in range(BYTES)] + [END_OF_TEXT]
    characters: set[str] = set().union(*documents)
    vocab = {token: index for index, token in enumerate([*tokens, *sorted(characters)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _wrap(core)


def encode_documents(
    tokenizer: PreTrainedTokenizerFast | ByteTokenizer, documents: Sequence[str]
) -> list[list[int]]:
    """Token ids of each document, without any special token."""
    if isinstance(tokenizer, ByteTokenizer):
        return [tokenizer.encode(document) for document in documents]
    encoded = tokenizer(
        list(documents),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,  # a document longer than the context is cut into rows later
    )
    return encoded["input_ids"]


def token_bytes(tokenizer: PreTrainedTokenizerFast | ByteTokenizer) -> Tensor:
    """How many UTF-8 bytes each token stands for: int64, shape (vocab,); special tokens are 0.

    Raises:
        ValueError: the tokenizer is neither of bytes nor of characters, so that a token has no fixed byte count.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return torch.tensor([1] * BYTES + [0])
    vocab = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    alphabet = set(_byte_characters())
    of_characters = bool(getattr(tokenizer.backend_tokenizer.model, "byte_fallback", False))
    counts = torch.zeros(max(vocab.values()) + 1, dtype=torch.long)
    for token, index in vocab.items():
        if token in special:
            continue
        if token in added or (of_characters and len(token) == 1):
            counts[index] = len(token.encode("utf-8"))
        elif of_characters and _SPELLED_BYTE.fullmatch(token):
            counts[index] = 1
        elif not of_characters and alphabet.issuperset(token):
            counts[index] = len(token)  # one character per byte
        else:
            raise ValueError(
                f"bits per byte needs a tokenizer of bytes or characters, but token {index} is {token!r}; "
                "use one from train_bpe, char_tokenizer or byte_tokenizer"
            )
    return counts


def _wrap_bytes(core: Tokenizer, *, split_words: bool) -> PreTrainedTokenizerFast:
    """As `_wrap`, for tokens that are bytes, written as printable characters."""
    from tokenizers import decoders, pre_tokenizers

    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    core.decoder = decoders.ByteLevel()
    return _wrap(core)


def _wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer around `core` that AutoTokenizer loads back offline."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,  # a mask tells padding from an end; training never pads by it
        padding_side="left",  # where generate() needs it; training rows are padded by heedful.data.packing
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_characters() -> list[str]:
    """The printable character by which byte-level BPE writes each byte, in byte order.

    GPT-2's convention: printable Latin-1 bytes stand for themselves, the others are numbered
    from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]


def _require_lm() -> None:
    try:
        import tokenizers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'this needs {error.name}, which is not installed; run: pip install "heedful[lm]"'
        ) from error

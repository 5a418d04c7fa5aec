"""Tokenizers: a round trip for every string, and a special token that text never produces."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.data import (
    END_OF_TEXT,
    ByteTokenizer,
    byte_tokenizer,
    char_tokenizer,
    encode_documents,
    load_text,
    token_bytes,
    train_bpe,
)

pytest.importorskip("transformers")

KINDS = ("bytes", "bpe", "chars", "bytes reloaded", "bpe reloaded", "chars reloaded")
SPECIAL_TEXTS = (
    END_OF_TEXT,
    f"a{END_OF_TEXT}b {END_OF_TEXT}",
    f"\n{END_OF_TEXT}\n",
    "<|endoftext|",
)
AWKWARD_TEXTS = (
    "",
    " ",
    "  two  spaces , dots .",
    "\r\n\t\x00",
    "naïve 漢字 🧑‍🚀",
    "don 't",
    "Ġ Ċ ċ",
)


@pytest.fixture(scope="module")
def chapters() -> list[str]:
    return load_text("austen").train[:4]


@pytest.fixture(scope="module")
def tokenizers(chapters, tmp_path_factory):
    from transformers import AutoTokenizer

    built = {
        "bytes": byte_tokenizer(),
        "bpe": train_bpe(chapters, 600),
        "chars": char_tokenizer([*chapters, "é漢"]),
    }
    for kind in list(built):
        folder = tmp_path_factory.mktemp(kind)
        built[kind].save_pretrained(folder)
        built[f"{kind} reloaded"] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return built


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_round_trip_of_any_string(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert encode_documents(tokenizer, [text]) == [ids]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SPECIAL_TEXTS + AWKWARD_TEXTS)
def test_text_never_produces_the_special_token(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    for ids in (
        tokenizer.encode(text),
        tokenizer(text)["input_ids"],
        *encode_documents(tokenizer, [text]),
    ):
        assert tokenizer.bos_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert int(token_bytes(tokenizer)[ids].sum()) == len(text.encode("utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_special_token(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.decode([tokenizer.bos_token_id]) == END_OF_TEXT
    assert tokenizer.decode([tokenizer.bos_token_id], skip_special_tokens=True) == ""


@pytest.mark.parametrize("kind", ["bytes", "bpe", "chars"])
def test_reloaded_tokenizer_has_the_same_ids(tokenizers, kind):
    assert tokenizers[f"{kind} reloaded"].get_vocab() == tokenizers[kind].get_vocab()
    text = "It is a truth universally acknowledged"
    assert tokenizers[f"{kind} reloaded"].encode(text) == tokenizers[kind].encode(text)


# Bytes


@given(st.text())
def test_plain_byte_tokenizer_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert encode_documents(tokenizer, [text]) == [ids]


@given(st.text())
def test_both_byte_tokenizers_agree(tokenizers, text):
    assert tokenizers["bytes"].encode(text) == ByteTokenizer().encode(text)


@given(st.lists(st.integers(0, 256)))
def test_both_byte_tokenizers_decode_alike(tokenizers, ids):
    assert tokenizers["bytes"].decode(ids) == ByteTokenizer().decode(ids)


def test_byte_tokenizer_sizes(tokenizers):
    assert len(ByteTokenizer()) == ByteTokenizer().vocab_size == len(tokenizers["bytes"]) == 257
    assert ByteTokenizer().bos_token_id == tokenizers["bytes"].bos_token_id == 256


@pytest.mark.parametrize("wrong", [-1, 257])
def test_byte_tokenizer_rejects_other_ids(wrong):
    with pytest.raises(ValueError, match=f"must be in 0-256, got {wrong}"):
        ByteTokenizer().decode([65, wrong])


# BPE


def test_bpe_has_the_size_asked_for(tokenizers):
    assert len(tokenizers["bpe"]) == 600


def test_bpe_is_deterministic(tokenizers, chapters):
    again = train_bpe(chapters, 600)
    assert again.backend_tokenizer.to_str() == tokenizers["bpe"].backend_tokenizer.to_str()


def test_bpe_stops_early_on_a_text_without_repetitions():
    assert len(train_bpe(["ab"], 2048)) == 258  # the bytes, the special token and "ab"
    assert len(train_bpe([], 2048)) == 257


def test_bpe_learns_nothing_of_the_marker():
    tokenizer = train_bpe([f"{END_OF_TEXT} " * 500], 400)
    assert tokenizer.bos_token_id not in tokenizer.encode(END_OF_TEXT)


@pytest.mark.parametrize("size", [0, 256])
def test_bpe_vocabulary_too_small(size):
    with pytest.raises(ValueError, match=f"vocab_size must be at least 257 .* got {size}"):
        train_bpe(["abc"], size)


# Characters


def test_characters_of_the_text_are_tokens_and_others_are_spelled():
    tokenizer = char_tokenizer(["bank", "né"])
    assert len(tokenizer) == 257 + len("abknné") - 1
    assert tokenizer.convert_ids_to_tokens(list(range(257, 262))) == ["a", "b", "k", "n", "é"]
    assert tokenizer.encode("né") == [260, 261]
    assert tokenizer.encode("nü") == [260, *"ü".encode()]
    assert tokenizer.encode("<0x41>") == list(b"<0x41>")  # spelled too, not the byte that it names
    assert tokenizer.decode([260, 0xFF, 261]) == "n\ufffdé"


def test_characters_do_not_depend_on_the_order_of_documents():
    first, second = char_tokenizer(["cab", "d"]), char_tokenizer(["d", "bac"])
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_token_bytes_refuses_foreign_byte_fallback():
    """Its word pieces write a space as another character."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={"<0x41>": 0, "\u2581the": 1}, merges=[], byte_fallback=True))
    with pytest.raises(ValueError, match="tokenizer of bytes or characters, but token 1 is"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=core))


# Bytes per token


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_token_bytes_add_up(tokenizers, kind, text):
    ids = tokenizers[kind].encode(text)
    assert int(token_bytes(tokenizers[kind])[ids].sum()) == len(text.encode("utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_special_token_stands_for_no_bytes(tokenizers, kind):
    counts = token_bytes(tokenizers[kind])
    assert counts.shape == (len(tokenizers[kind]),)
    assert (counts == 0).nonzero().flatten().tolist() == [tokenizers[kind].bos_token_id]


def test_plain_byte_tokenizer_token_bytes(tokenizers):
    assert token_bytes(ByteTokenizer()).tolist() == token_bytes(tokenizers["bytes"]).tolist()


def test_added_tokens_count_their_characters():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["été"])
    assert token_bytes(tokenizer)[257] == 5


def test_token_bytes_needs_a_byte_level_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[UNK]": 0, "漢字": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="tokenizer of bytes or characters, but token 1 is"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=core))


@pytest.mark.parametrize(
    "build",
    [byte_tokenizer, lambda: train_bpe(["abc"]), lambda: char_tokenizer(["abc"])],
    ids=["bytes", "bpe", "chars"],
)
@pytest.mark.parametrize("package", ["tokenizers", "transformers"])
def test_missing_package_says_what_to_install(monkeypatch, build, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "heedful\[lm\]"'):
        build()

"""A .gguf file, written with the package gguf, converts into what its source is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stock import save_stock_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import heedful
from heedful.hf.names import output_cache

gguf = pytest.importorskip("gguf")
TEXT = "It is a truth universally acknowledged"


def write_gguf(source: Path, file: Path, kind: str = "F32") -> Any:
    """The llama in a folder as llama.cpp would write it: matrices of a kind, pairs of a rotation side by side.

    Returns the stock model with the weights that the file holds.
    """
    model = AutoModelForCausalLM.from_pretrained(source)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer = json.loads((source / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, held in model.state_dict().items():
        value, pairs = held, 0
        for projection, n in heads.items():
            if projection in name:
                value, pairs = value.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2), n
        own = gguf.GGMLQuantizationType[kind if value.ndim == 2 and value.shape[1] % 32 == 0 else "F32"]
        data = gguf.quants.quantize(value.numpy(), own)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=own)
        rounded = torch.from_numpy(gguf.quants.dequantize(data, own).copy())
        held.copy_(rounded.unflatten(0, (pairs, -1, 2)).transpose(1, 2).flatten(0, 2) if pairs else rounded)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_stock_model(tmp_path / "stock", [TEXT * 9])


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_it_is_its_source(kind: str, source: Path, tmp_path: Path, ids: Tensor):
    stock = write_gguf(source, tmp_path / "model.gguf", kind)
    model, tokenizer = heedful.load(heedful.convert(tmp_path / "model.gguf", tmp_path / "out", select_dim=4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out", "stock"]
    with torch.no_grad():
        expected, got = stock(ids).logits, model(ids).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        output = model.generate(ids, max_new_tokens=4, kv_budget=8, return_dict_in_generate=True)
        assert output_cache(output).kept == [8, 8]
    assert tokenizer is not None
    assert tokenizer(TEXT)["input_ids"][-9:] == AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"][-9:]
    heedful.convert(tmp_path / "out", tmp_path / "back", back=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(stock)
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, got, rtol=0, atol=1e-5)


def test_a_damaged_file(source: Path, tmp_path: Path):
    whole = tmp_path / "model.gguf"
    write_gguf(source, whole)
    for name, content in {"cut.gguf": whole.read_bytes()[:2000], "none.gguf": b"no"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read by transformers") as raised:
            heedful.convert(tmp_path / name, tmp_path / "a" / "out")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "a").exists()

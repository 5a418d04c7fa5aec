"""Faults that were found by trying, each with what it did."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stock import save_stock_model
from torch import Tensor
from transformers import AutoTokenizer, Trainer, TrainingArguments

import heedful
from heedful.hf.converted.model import attention_layers
from heedful.hf.names import output_cache

LONG = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32},
    **{"short_factor": [1.0] * 2, "long_factor": [4.0] * 2},
}


@pytest.mark.parametrize("length", [28, 40])
def test_a_family_that_drops_its_cache_keeps_its_budget(length: int, make_source: Callable[..., Any]):
    """Phi-3 reads a text anew where its rotation changes; the new cache held everything."""
    more = {"rope_parameters": LONG, "original_max_position_embeddings": 32, "eos_token_id": None}
    model = heedful.patch(make_source("phi3", **more))
    ids = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    output = model.generate(ids, kv_budget=9, **how)
    # early versions of transformers go on from the last token alone
    stock = output_cache(make_source("phi3", **more).generate(ids, **how)).get_seq_length()
    assert output_cache(output).kept == [min(9, stock)] * 3


def test_force_never_deletes_what_is_not_the_model_in_its_way(
    save_source: Callable[..., Path], tmp_path: Path
):
    """OUT was the folder of a Trainer, with the source and other checkpoints in it."""
    run = save_source("llama", folder="run")
    for name in ("checkpoint-5", "checkpoint-6"):
        save_source("llama", folder=f"run/{name}")
    for source, out in (
        (run / "checkpoint-5", run),
        (run, run / "checkpoint-5"),
        (run / "checkpoint-5", tmp_path),
    ):
        with pytest.raises(ValueError, match="lies in the other"):
            heedful.convert(source, out, force=True)
    other = save_source("llama", folder="other")
    with pytest.raises(ValueError, match="holds more than a model"):
        heedful.convert(other, run, force=True)
    link = tmp_path / "link"
    link.symlink_to(other)
    with pytest.raises(ValueError, match="is a symbolic link"):
        heedful.convert(run / "checkpoint-6", link, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "other", "run"]
    assert {"checkpoint-5", "checkpoint-6"} <= {p.name for p in run.iterdir()}


@pytest.mark.parametrize(
    ("family", "more"), [("mistral", {"sliding_window": 6}), ("gpt2", {"attn_pdrop": 0.3})]
)
def test_a_patch_that_fails_leaves_the_model_as_it_was(
    family: str,
    more: dict[str, Any],
    make_source: Callable[..., Any],
    ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
):
    model = make_source(family, **more)
    expected, before = model(ids).logits, model.config.to_dict()
    calls: list[Any] = []

    def broken(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise ValueError("broken")

    monkeypatch.setattr("heedful.hf.converted.model.start", broken)
    with pytest.raises(ValueError, match="broken"):
        heedful.patch(model, attention="sas")
    assert type(model) is type(make_source(family, **more))
    assert model.config.to_dict() == before and type(model.config) is type(make_source(family).config)
    assert torch.equal(model(ids).logits, expected)
    assert not any(".score" in name or ".sas" in name for name, _ in model.named_parameters())
    if family == "gpt2":
        assert model.transformer.h[0].attn.attn_dropout.p == 0.3


def test_an_assistant_with_windows(make_source: Callable[..., Any], ids: Tensor):
    plain = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    main, assistant = heedful.patch(make_source("qwen2")), heedful.patch(make_source("qwen2", seed=1))
    alone = main.generate(ids[:1], **plain)
    assert torch.equal(main.generate(ids[:1], assistant_model=assistant, **plain), alone)
    held = {"kv_budget": 12, "kv_policy": "streaming"}
    alone = main.generate(ids[:1], **plain, **held)
    assert torch.equal(main.generate(ids[:1], assistant_model=assistant, **plain, **held), alone)


def test_a_changed_config_goes_back(save_source: Callable[..., Path], tmp_path: Path):
    """Names that the source's config.json lacks were lost, the rotation of a tuned model among them."""
    out = heedful.convert(save_source("olmo2"), tmp_path / "out")
    model, _ = heedful.load(out)
    model.config.rope_theta_note = 7
    model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    model.save_pretrained(tmp_path / "tuned")
    heedful.convert(tmp_path / "tuned", tmp_path / "back", back=True)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_parameters"]["factor"] == 4.0 and config["rope_theta_note"] == 7
    assert config["model_type"] == "olmo2" and "heedful" not in config and "auto_map" not in config


def test_a_stretching_rotation_widens_the_certified_bound(make_source: Callable[..., Any]):
    model = heedful.patch(make_source("qwen3"))
    stretch = model.model.rotary_emb.attention_scaling
    layer = attention_layers(model)[0]
    assert stretch > 1.05 and layer.stretch == stretch
    gains = torch.tensor([4.0, 1, 1, 1, 1, 1, 1, 1])
    layer.q_norm.weight.data.copy_(gains)
    longest = (layer.q_norm(torch.tensor([5.0, 0, 0, 0, 0, 0, 0, 0])) * stretch).norm()
    real = torch.ones(1, 1, dtype=torch.bool)
    sizes = layer.logit_sizes(torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 1, 8), real, real)
    assert sizes[0, 0] >= longest * layer.scale**0.5 * (1 - 1e-6)


def test_the_tokenizer_of_the_family_is_found(save_source: Callable[..., Path], tmp_path: Path):
    source = save_source("gpt2")
    tokens = ["<|endoftext|>", *map(chr, range(97, 123)), "Ġ"]
    (source / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    stock = AutoTokenizer.from_pretrained(source)
    own = AutoTokenizer.from_pretrained(heedful.convert(source, tmp_path / "out"))
    assert type(own) is type(stock) and own.bos_token == stock.bos_token == "<|endoftext|>"


def test_it_can_be_pickled(make_source: Callable[..., Any], ids: Tensor):
    model = heedful.patch(make_source("llama"))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_shard_of_our_name_is_kept(save_source: Callable[..., Path], tmp_path: Path):
    source = save_source("llama")
    (source / "model.safetensors").rename(source / "model-heedful.safetensors")
    weights = heedful.convert(save_source("llama", folder="same"), tmp_path / "same-out")
    index = json.loads((weights / "model.safetensors.index.json").read_text())["weight_map"]
    stock = {name: "model-heedful.safetensors" for name in index if ".score." not in name}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": stock}))
    model, _ = heedful.load(heedful.convert(source, tmp_path / "out"))
    assert model.num_parameters() > 0
    heedful.convert(tmp_path / "out", tmp_path / "back", back=True)
    heedful.convert(tmp_path / "back", tmp_path / "again")


def test_trainer_hands_it_what_it_takes(save_source: Callable[..., Path], tmp_path: Path):
    """Without a signature every column was dropped."""
    stock = save_stock_model(tmp_path / "stock", ["a tiny text " * 40])
    model, tokenizer = heedful.load(heedful.convert(stock, tmp_path / "out"))
    assert tokenizer is not None
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "note": 5}] * 4
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    assert "eval_loss" in trainer.evaluate()

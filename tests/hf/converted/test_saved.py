"""What stands in a folder once a model is saved there, whatever stood there before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful.hf.converted.checkpoint import Checkpoint


def weights_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "safetensors" in path.name}


def check(folder: Path, model: Any, ids: Tensor) -> None:
    """The folder holds the model, and no weights that its index does not name."""
    named = set(Checkpoint.read(folder).files)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = {index.name, *json.loads(index.read_text())["weight_map"].values()}
    assert weights_in(folder) == named
    again, _ = heedful.load(folder)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_config_that_transformers_refuses(save_source: Callable[..., Path], tmp_path: Path):
    """With an error of its own, and over several lines."""
    heedful.convert(save_source("llama"), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": {"a": 1}}))
    with pytest.raises(ValueError, match=r"the model in .*out cannot be read \(.*eos_token_id") as error:
        heedful.load(tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("before", ["converted", "whole", "shards"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_no_weights_of_another_model_stay(
    before: str,
    shard: str,
    make_source: Callable[..., Any],
    save_source: Callable[..., Path],
    tmp_path: Path,
    ids: Tensor,
):
    """A whole file that stayed beside new shards was loaded instead of them."""
    out = tmp_path / "out"
    if before == "converted":
        heedful.convert(save_source("llama", shard="30KB", tie_word_embeddings=False), out)
    else:
        size = "5GB" if before == "whole" else "10KB"
        heedful.patch(make_source("llama", seed=2)).save_pretrained(out, max_shard_size=size)
    (out / "adapter_model.safetensors").write_bytes(b"an adapter")
    model = heedful.patch(make_source("llama", seed=1), select_dim=4)
    model.save_pretrained(out, max_shard_size=shard)
    assert (out / "adapter_model.safetensors").read_bytes() == b"an adapter"
    (out / "adapter_model.safetensors").unlink()
    check(out, model, ids)


def test_a_model_saved_where_it_was_converted(save_source: Callable[..., Path], tmp_path: Path, ids: Tensor):
    out = heedful.convert(save_source("qwen2"), tmp_path / "out")
    model, _ = heedful.load(out)
    model.save_pretrained(out)
    check(out, model, ids)
    heedful.convert(out, tmp_path / "back", back=True)
    assert weights_in(tmp_path / "back") == {"model.safetensors"}


def test_a_variant_stands_beside(make_source: Callable[..., Any], tmp_path: Path):
    model = heedful.patch(make_source("llama"))
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", variant="fp16")
    assert weights_in(tmp_path / "out") == {"model.safetensors", "model.fp16.safetensors"}


def test_an_index_never_names_files_outside(make_source: Callable[..., Any], tmp_path: Path):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"mine")
    out = tmp_path / "out"
    out.mkdir()
    index = {"weight_map": {"a": "../mine.safetensors", "b": str(mine), "c": "notes.txt"}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "notes.txt").write_text("notes")
    heedful.patch(make_source("llama")).save_pretrained(out)
    assert mine.read_bytes() == b"mine" and (out / "notes.txt").exists()
    assert weights_in(out) == {"model.safetensors"}

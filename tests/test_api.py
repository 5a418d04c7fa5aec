"""`heedful.train`, `heedful.compare`, `heedful.load`: the commands as functions."""

import dataclasses
import inspect
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import heedful
from heedful.comparison import CompareSettings
from heedful.training import RunResult, TrainSettings


@pytest.fixture
def small(text_file: Path) -> dict[str, Any]:
    """Options of a run that takes a fraction of a second."""
    return {
        "data": text_file,
        "tokenizer": "bytes",
        "d_model": 16,
        "n_layers": 1,
        "n_heads": 2,
        "context": 32,
        "batch_size": 4,
        "steps": 3,
        "console": Console(file=io.StringIO()),
    }


def test_train_and_load(small: dict[str, Any], tmp_path: Path):
    result = heedful.train(tmp_path / "run", attention="sas", score="selective", **small)
    assert isinstance(result, RunResult)
    assert (result.attention, result.score, result.tokens) == ("sas", "selective", 3 * 4 * 32)
    model, tokenizer = loaded = heedful.load(tmp_path / "run")
    assert loaded.model is model
    assert not model.training
    assert tokenizer.encode("cat") == list(b"cat")
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 257)


def test_resume_takes_the_options_of_the_run(small: dict[str, Any], tmp_path: Path):
    done = heedful.train(tmp_path / "run", **small)
    assert heedful.train(tmp_path / "run", resume=True).val_loss == done.val_loss
    with pytest.raises(ValueError, match=r"lr was 0\.002 and is 0\.1"):
        heedful.train(tmp_path / "run", resume=True, lr=0.1)
    with pytest.raises(FileExistsError, match="already holds a run"):
        heedful.train(tmp_path / "run", **small)


def test_load_without_a_tokenizer(small: dict[str, Any], tmp_path: Path):
    small |= {"data": "synthetic:variable-assignment", "context": 16}
    heedful.train(tmp_path / "run", **small)
    assert heedful.load(tmp_path / "run").tokenizer is None
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        heedful.load(tmp_path / "nowhere")


def test_compare(small: dict[str, Any], tmp_path: Path):
    results = heedful.compare(
        tmp_path,
        attention=["mha", "sas"],
        score="softmax",
        seeds=1,
        attention_options={"sim_heads": 4},
        **small,
    )
    assert [(r.attention, r.score) for r in results] == [("mha", "softmax"), ("sas", "softmax")]
    assert results[1].config["model"]["attention_options"] == {"sim_heads": 4}
    assert (tmp_path / "summary.md").exists()


def test_signatures_are_those_of_the_settings():
    train = inspect.signature(heedful.train).parameters
    for field in dataclasses.fields(TrainSettings):
        assert train[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert train[field.name].annotation == field.type
        assert getattr(TrainSettings(), field.name) == train[field.name].default
        assert f"{field.name}: {field.metadata['help']}" in heedful.train.__doc__
    assert list(train)[:3] == ["out", "resume", "console"]
    compare = inspect.signature(heedful.compare).parameters
    assert compare["attention"].default == CompareSettings().attention
    assert {"seeds", "match", "lr_sweep", "steps", "d_model", "trainer"} <= set(compare)
    assert not {"seed", "train", "options"} & set(compare)


def test_unknown_options(tmp_path: Path):
    with pytest.raises(TypeError, match=r"heedful\.train has no option 'stepz'; did you mean 'steps'\?"):
        heedful.train(tmp_path / "run", stepz=3)
    with pytest.raises(TypeError, match=r"heedful\.compare has no option 'seed'; did you mean 'seeds'\?"):
        heedful.compare(tmp_path / "run", seed=3)
    with pytest.raises(TypeError, match=r"heedful\.train has no option 'zzzzzz'; it has: attention, score"):
        heedful.train(tmp_path / "run", zzzzzz=3)
    assert not (tmp_path / "run").exists()


def test_without_the_extras():
    """Names and signatures are there with torch alone; a call says what to install, in one way."""
    code = """
import inspect, sys
extras = ["transformers", "tokenizers", "datasets", "accelerate", "safetensors", "tyro", "rich", "matplotlib"]
sys.modules.update(dict.fromkeys(extras))  # None: neither found nor imported
from heedful import *
import heedful
assert "steps" in inspect.signature(heedful.train).parameters
calls = [heedful.train, lambda: heedful.compare(steps=3), lambda: heedful.load("runs/a")]
for call in calls:
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needs = [
        "heedful.train needs transformers, accelerate, tokenizers, safetensors, rich",
        "heedful.compare needs transformers, accelerate, tokenizers, safetensors, rich, matplotlib",
        "heedful.load needs transformers, tokenizers, safetensors",
    ]
    how = ', not installed here; run: pip install "heedful[lm]"'
    assert done.stdout.splitlines() == [need + how for need in needs]


def test_loading_needs_neither_datasets_nor_accelerate(small: dict[str, Any], tmp_path: Path):
    heedful.train(tmp_path / "run", **small)
    code = """
import sys
sys.modules.update(dict.fromkeys(["datasets", "accelerate", "tyro", "rich", "matplotlib"]))
import heedful
model, tokenizer = heedful.load(sys.argv[1])
ids = tokenizer("the cat", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=4, do_sample=False).shape[1])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "11"

"""A `custom_generate` folder: a stock model generates under a budget, and is the stock model afterwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.converted.test_families import let_them_vote
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

import heedful
from heedful.hf.names import output_cache

FOLDER = Path(__file__).parents[3] / "integrations" / "kv-budget"
USE: dict[str, Any] = {"custom_generate": str(FOLDER), "trust_remote_code": True}
PLAIN: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the file that it runs into a cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def state_of(model: Any) -> list[Any]:
    return [type(model), type(model.config), model.config.to_dict(), *map(type, model.modules())]


@pytest.mark.parametrize(
    "family", ["qwen2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "gpt2"))]
)
def test_a_stock_model_under_a_budget(family: str, make_source: Callable[..., Any], ids: Tensor):
    stock = make_source(family)
    before, alone = state_of(stock), stock.generate(ids, **PLAIN).sequences
    for policy in ("streaming", "tova"):  # of qwen2's layers one is without a window
        output = stock.generate(ids, **PLAIN, **USE, kv_budget=9, kv_policy=policy)
        patched = heedful.patch(make_source(family), score="softmax")
        expected = patched.generate(ids, **PLAIN, kv_budget=9, kv_policy=policy)
        assert torch.equal(output.sequences, expected.sequences)
        assert set(output_cache(output).kept) == {9}
    assert state_of(stock) == before and not any("score" in name for name, _ in stock.named_modules())
    assert torch.equal(stock.generate(ids, **PLAIN).sequences, alone)
    output = stock.generate(ids, generation_config=GenerationConfig(kv_budget=7, **PLAIN), **USE)
    assert output_cache(output).eviction.policy == "streaming" and set(output_cache(output).kept) == {7}


def test_a_converted_checkpoint_gives_a_stock_model_its_votes_and_budget(
    save_source: Callable[..., Path], tmp_path: Path, ids: Tensor
):
    source = save_source("llama")
    model, _ = heedful.load(
        heedful.convert(source, tmp_path / "out", select_dim=4, per="kv_head", eviction=9)
    )
    let_them_vote(model)
    model.save_pretrained(tmp_path / "voting")
    expected = model.generate(ids, **PLAIN)
    stock = AutoModelForCausalLM.from_pretrained(source)
    before = state_of(stock)
    for more in ({"kv_budget": 7}, {}):
        output = stock.generate(ids, **PLAIN, **USE, kv_from=str(tmp_path / "voting"), **more)
        assert set(output_cache(output).kept) == {more.get("kv_budget", 9)}
    assert torch.equal(output.sequences, expected.sequences)
    assert not torch.equal(stock.generate(ids, **PLAIN, **USE, kv_budget=9).sequences, expected.sequences)
    assert state_of(stock) == before
    with torch.no_grad():
        stock.model.layers[1].mlp.up_proj.weight[0] += 1
    with pytest.raises(ValueError, match=r"up_proj.weight of .* differs from the model's: its selectors"):
        stock.generate(ids, **PLAIN, **USE, kv_from=str(tmp_path / "voting"))
    assert state_of(stock) == before


def test_a_converted_model_keeps_to_its_own(make_source: Callable[..., Any], ids: Tensor):
    model = heedful.patch(make_source("llama"), select_dim=4, eviction=8)
    output = model.generate(ids, **PLAIN, **USE)
    assert output_cache(output).kept == [8, 8, 8]
    with pytest.raises(ValueError, match="has its own: leave it out"):
        model.generate(ids, **PLAIN, **USE, kv_from="anywhere")


def test_where_a_budget_would_be_ignored(
    make_source: Callable[..., Any], save_source: Callable[..., Path], ids: Tensor
):
    stock = make_source("llama")
    with pytest.raises(ValueError, match="no budget is given: kv_budget=256"):
        stock.generate(ids, **PLAIN, **USE)
    with pytest.raises(ValueError, match="kv_budget"):  # transformers itself
        stock.generate(ids, **PLAIN, kv_budget=8)
    with pytest.raises(ValueError, match="trust_remote_code"):
        stock.generate(ids, **PLAIN, custom_generate=str(FOLDER), trust_remote_code=False, kv_budget=8)
    with pytest.raises(ValueError, match="use_cache=False"):
        stock.generate(ids, **PLAIN, **USE, kv_budget=8, use_cache=False)
    with pytest.raises(ValueError, match="expected one that was converted from this 'llama' model"):
        stock.generate(ids, **PLAIN, **USE, kv_from=str(save_source("gpt2")))
    stock.config.model_type = "mamba"
    with pytest.raises(ValueError, match="it has no attention"):
        stock.generate(ids, **PLAIN, **USE, kv_budget=8)

"""Where an eviction can be asked for, and who overrules whom."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from heedful import Eviction
from heedful.hf import HeedfulCache, HeedfulConfig, HeedfulForCausalLM

IDS = torch.arange(2, 16)[None]


@pytest.fixture
def model() -> HeedfulForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return HeedfulForCausalLM(HeedfulConfig(**sizes, score="selective")).eval()


def asked(model: HeedfulForCausalLM, **options) -> Eviction:
    options = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 3, **options}
    output = model.generate(IDS, **options)
    cache = output.get("cache", output.get("past_key_values"))
    assert isinstance(cache, HeedfulCache)
    return cache.eviction


def test_one_value_or_its_parts(model: HeedfulForCausalLM):
    eviction = Eviction(4, "streaming", evict_every=2)
    assert asked(model, kv_budget=eviction) == eviction
    assert asked(model, kv_budget=4, kv_policy="streaming", kv_evict_every=2) == eviction
    nll = model.evaluate_nll(IDS, kv_budget=eviction)
    assert nll == model.evaluate_nll(IDS, kv_budget=4, kv_policy="streaming", kv_evict_every=2)
    assert nll != model.evaluate_nll(IDS, kv_budget=4)


def test_a_generation_config_is_honoured(model: HeedfulForCausalLM):
    given = GenerationConfig(kv_budget=5, kv_policy="h2o", do_sample=False, max_new_tokens=3)
    given.return_dict_in_generate = True
    assert asked(model, generation_config=given) == Eviction(5, "h2o")
    assert asked(model, generation_config=given, kv_budget=3) == Eviction(3, "h2o")


def test_the_order(model: HeedfulForCausalLM):
    """An argument, then the generation config given, then the model's, then the config."""
    model.config.eviction = Eviction([6, 7], "streaming").to_dict()
    assert asked(model) == Eviction([6, 7], "streaming")
    assert asked(model, kv_budget=9) == Eviction(9, "streaming")
    assert asked(model, kv_policy="tova") == Eviction([6, 7], "tova")
    model.generation_config.kv_budget = 8
    assert asked(model) == Eviction(8, "streaming")
    assert asked(model, generation_config=GenerationConfig(kv_budget=5)) == Eviction(5, "streaming")
    assert asked(model, generation_config=GenerationConfig(kv_budget=5), kv_budget=4).budget == 4
    assert not asked(model, kv_budget="full").evicts


def test_it_is_saved_with_its_policy(model: HeedfulForCausalLM, tmp_path: Path):
    model.config.eviction = Eviction([6, 7], "streaming", 2).to_dict()
    model.generation_config.kv_budget = 8
    model.save_pretrained(tmp_path)
    loaded = HeedfulForCausalLM.from_pretrained(tmp_path)
    assert Eviction.of(loaded.config.eviction) == Eviction([6, 7], "streaming", 2)
    assert loaded.generation_config.kv_budget == 8
    assert asked(loaded).budget == 8


def test_budgets_of_an_early_version_load():
    config = HeedfulConfig(num_hidden_layers=2, score="selective", kv_budgets=[5, 6])
    assert Eviction.of(config.eviction) == Eviction([5, 6])
    with pytest.raises(ValueError, match=r"one entry per layer \(2\), got 3"):
        HeedfulConfig(num_hidden_layers=2, eviction={"budget": [4, 5, 6]})


def test_a_cache_says_what_it_is(model: HeedfulForCausalLM):
    cache = HeedfulCache(2, 4, "streaming")
    with torch.no_grad():
        model(IDS, use_cache=True, past_key_values=cache)
    assert repr(cache).startswith("HeedfulCache(2 layers, 14 tokens seen, 4, 4 kept, ")
    assert "streaming" in repr(cache)
    assert "everything" in repr(HeedfulCache(2))


def test_names_of_the_decoder_are_refused():
    with pytest.raises(ValueError, match="no field 'd_model'; here it is 'hidden_size'"):
        HeedfulConfig(d_model=16)

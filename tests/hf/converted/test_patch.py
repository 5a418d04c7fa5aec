"""The light way: a stock model in memory. What it saves loads as a converted one, or not at all."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaForSequenceClassification

import heedful
from heedful.attention.eviction import POLICIES, Eviction
from heedful.hf.converted import HeedfulLlamaConfig, HeedfulLlamaForCausalLM  # type: ignore[attr-defined]
from heedful.hf.names import CACHE, output_cache

SUBTRACTED: dict[str, Any] = {"selector": "added", "subtract": True, "select_dim": 4}


def test_a_patched_model_is_its_source_and_saves_as_converted(
    make_source: Callable[..., Any], tmp_path: Path, ids: Tensor
):
    stock, model = make_source("llama"), make_source("llama")
    assert heedful.patch(model, select_dim=4, eviction=12) is model
    assert type(model) is HeedfulLlamaForCausalLM and type(model.config) is HeedfulLlamaConfig
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(again) is HeedfulLlamaForCausalLM
    output = again.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert output_cache(output).kept == [12, 12, 12]  # as the conversion says
    heedful.convert(tmp_path / "saved", tmp_path / "back", back=True)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is type(stock)


def test_other_policies_in_a_stock_model(make_source: Callable[..., Any], ids: Tensor):
    """In parallel, token by token and in `generate` alike; nobody is evicted by two of them alike."""
    model = heedful.patch(make_source("qwen2"), score="softmax").double()
    assert model.num_parameters() == make_source("qwen2").num_parameters()
    held = []
    for policy in (name for name in POLICIES if name != "selective"):
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
        output = model.generate(ids, kv_budget=15, kv_policy=policy, **options)
        assert output_cache(output).kept == [15]  # the two other layers have windows of their own
        held.append(output_cache(output).memories[-1].positions.sort().values.tolist())
        caches = [model.new_cache(Eviction(15, policy)) for _ in range(2)]
        with torch.no_grad():
            logits = model(output.sequences, **{CACHE: caches[0]}).logits
            singly = [model(token, **{CACHE: caches[1]}).logits for token in output.sequences.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(singly, 1), logits)
        assert torch.equal(logits[:, ids.shape[1] - 1 : -1].argmax(-1), output.sequences[:, ids.shape[1] :])
    assert all(one != other for one, other in itertools.combinations(held, 2))
    with pytest.raises(ValueError, match="needs score 'selective'"):
        model.generate(ids, max_new_tokens=4, kv_budget=8)


def test_what_is_no_causal_model_is_refused(make_source: Callable[..., Any]):
    model = make_source("llama")
    for other in (model.model, LlamaForSequenceClassification(model.config)):
        with pytest.raises(ValueError, match="expected a LlamaForCausalLM"):
            heedful.patch(other)
        assert other.config.model_type == "llama"
    heedful.patch(model)
    with pytest.raises(ValueError, match="is a heedful model already"):
        heedful.patch(model)


@pytest.mark.slow
def test_a_backbone_alone_is_not_taken_for_the_stock_one(make_source: Callable[..., Any], tmp_path: Path):
    heedful.patch(make_source("llama"), select_dim=4).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="HeedfulLlamaConfig"):
        AutoModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_changes_nothing(
    checkpointing: dict[str, bool], make_source: Callable[..., Any], ids: Tensor
):
    grads = []
    for on in (False, True):
        model = heedful.patch(make_source("llama"), **SUBTRACTED).train()
        for module in model.modules():
            if hasattr(module, "select_k"):
                torch.nn.init.normal_(
                    module.select_k.weight, std=0.5, generator=torch.Generator().manual_seed(1)
                )
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)


def test_qk_norm_certifies_what_a_threshold_forgets(make_source: Callable[..., Any], ids: Tensor):
    """A bound that holds: the outputs of a model that forgot under a threshold differ by no more than it says."""
    model = heedful.patch(make_source("qwen3"), **SUBTRACTED)
    for module in model.modules():
        if hasattr(module, "select_k"):
            torch.nn.init.normal_(module.select_k.weight, std=1.0)
    with torch.no_grad():
        output = model.generate(
            ids, max_new_tokens=8, kv_threshold=60.0, do_sample=False, return_dict_in_generate=True
        )
    bounds = output_cache(output).forgotten
    assert len(bounds) == 3 and all(bound.shape == (2,) for bound in bounds)
    assert all(bool(((bound >= 0) & (bound <= 1)).all()) for bound in bounds)

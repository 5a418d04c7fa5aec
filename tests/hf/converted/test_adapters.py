"""PEFT on converted models, as on their sources: it finds what to adapt by itself."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful

peft = pytest.importorskip("peft")


def adapted(model: Any) -> list[str]:
    return [name.split("base_model.model.")[-1] for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
def test_lora_without_target_modules(family: str, make_source: Callable[..., Any], ids: Tensor):
    stock = peft.get_peft_model(make_source(family), peft.LoraConfig(task_type="CAUSAL_LM"))
    model = peft.get_peft_model(
        heedful.patch(make_source(family), select_dim=4), peft.LoraConfig(task_type="CAUSAL_LM")
    )
    assert adapted(model) == adapted(stock) != []
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert model.generate(input_ids=ids, max_new_tokens=2, kv_budget=8).shape == (2, 26)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_simulated_heads_are_trained_whole_beside_lora(
    family: str, make_source: Callable[..., Any], ids: Tensor
):
    model = peft.get_peft_model(
        heedful.patch(make_source(family), select_dim=4, attention="sas"),
        peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["sas"]),
    )
    model(ids, labels=ids).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(".sas." in name for name in trained) == 36
    assert all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        assert model.generate(input_ids=ids, max_new_tokens=2, kv_budget=8).shape == (2, 26)
    merged = model.merge_and_unload()
    assert sum(".sas." in name for name, _ in merged.named_parameters()) == 36


def test_what_peft_does_not_know_stays_unknown(make_source: Callable[..., Any]):
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(heedful.patch(make_source("olmo2")), peft.LoraConfig())


@pytest.mark.slow
def test_heedful_does_not_import_peft():
    """PEFT may come after the model, too."""
    code = """
import sys, heedful, heedful.hf
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
model = heedful.patch(LlamaForCausalLM(config))
assert "peft" not in sys.modules
from peft import LoraConfig, get_peft_model
print(get_peft_model(model, LoraConfig()).peft_config["default"].target_modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "q_proj" in done.stdout

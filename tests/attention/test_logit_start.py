"""How large the logits are at the start, whatever a form calls its projections."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from heedful.attention import Attention, build, register_attention
from heedful.attention.registry import ATTENTIONS

SIZES = {"d_model": 64, "n_heads": 4, "qk_norm": False, "rope": False}


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ATTENTIONS, "forms", dict(ATTENTIONS.forms))


def logit_std(module: Attention) -> float:
    x = torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32)[None]
    with torch.no_grad():
        q, memory = module.project(x, positions)
        memory = {n: t.expand(8, *t.shape[1:]) if t.ndim == 2 else t for n, t in memory.items()}
        k, _ = module.keys_values(memory)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return float((q @ k.mT * module.scale).std())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mha", {}),
        ("gqa", {"n_kv_heads": 2}),
        ("mla", {}),
        ("mla", {"q_lora_rank": 24, "kv_lora_rank": 16, "rope_head_dim": 6}),
        ("tpa", {}),
        ("tpa", {"q_rank": 3, "k_rank": 1}),
        ("sas_linear", {"qk_norm": True}),
        ("shared_kv", {}),
    ],
)
@pytest.mark.parametrize("std", [0.2, 1.0])
def test_logits_start_as_the_config_says(forms: None, name: str, options: dict, std: float):
    if name == "shared_kv":
        path = Path(__file__).parents[2] / "examples" / "shared_kv.py"
        spec = importlib.util.spec_from_file_location("shared_kv_for_logits", path)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    torch.manual_seed(0)
    module = build(name, **SIZES | options, init_logit_std=std)
    assert logit_std(module) == pytest.approx(std, rel=0.25)


def test_a_form_that_does_not_say_is_refused(forms: None):
    class Silent(Attention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.queries = nn.Linear(64, 64)
            self.reset_parameters()

    register_attention("silent")(Silent)
    with pytest.raises(NotImplementedError, match=r"Silent must say .* logit_projections\(\)"):
        build("silent", **SIZES)
    build("silent", **{**SIZES, "qk_norm": True})  # the gains of the norm see to it

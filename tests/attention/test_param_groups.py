"""What weight decay touches, and how parameters start."""

import pytest
import torch
from torch import nn

from heedful.attention import build, param_groups
from heedful.attention.params import decayed_names

TAPS = {
    "q_expand.conv1.weight",
    "q_expand.lin1.weight",
    "k_expand.conv1.weight",
    "k_expand.lin1.weight",
    "v_expand.conv1.weight",
}


@pytest.mark.parametrize(("init", "decayed"), [("identity", False), ("published", True)])
def test_identity_taps_are_not_decayed(init: str, decayed: bool):
    module = build("sas", d_model=32, n_heads=4, init=init)
    names = set(decayed_names(module))
    assert names & TAPS == (TAPS if decayed else set())
    assert {"q_proj.weight", "o_proj.weight", "q_expand.conv2.weight", "k_expand.lin2.weight"} <= names
    assert not any(name.endswith("bias") or "norm" in name for name in names)


def test_groups_of_a_model_around_the_form():
    """Any module may hold forms; shared and frozen parameters appear once or not at all."""
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 32),
            "a": build("sas", "selective", d_model=32, n_heads=4, init="identity"),
            "b": build("mha", d_model=32, n_heads=4, bias=True),
            "head": nn.Linear(32, 7),
        }
    )
    model["head"].weight = model["embed"].weight
    model["b"].q_proj.weight.requires_grad_(False)
    decay, keep = param_groups(model, 0.3)
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)
    ids = [id(p) for p in decay["params"] + keep["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    kept = {id(p) for p in keep["params"]}
    assert {id(model["a"].get_parameter(name)) for name in TAPS} <= kept
    optimizer = torch.optim.AdamW([decay, keep], lr=0.1)
    before = model["a"].get_parameter("q_expand.conv1.weight").clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model["a"].get_parameter("q_expand.conv1.weight"), before)


def test_negative_decay_is_refused():
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="weight_decay must be 0 or more, got"):
            param_groups(build("mha", d_model=32, n_heads=4), wrong)


@pytest.mark.parametrize("qk_norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("std", [0.2, 1.0])
def test_logits_start_as_configured(qk_norm: bool, std: float):
    torch.manual_seed(0)
    module = build("mha", d_model=256, n_heads=8, qk_norm=qk_norm, init_logit_std=std)
    with torch.no_grad():
        q, memory = module.project(torch.randn(4, 64, 256), torch.arange(64)[None])
        logits = q @ memory["k"].transpose(-1, -2) * module.config.qk_dim**-0.5
    assert logits.std().item() == pytest.approx(std, rel=0.1)


def test_loaded_weights_are_left_alone():
    """Model loaders mark what a checkpoint has filled; an identity start must not write over it."""
    module = build("sas", d_model=32, n_heads=4, init="identity")
    weight = module.q_expand.conv1.weight
    with torch.no_grad():
        weight.fill_(7.0)
    weight._is_hf_initialized = True
    module.reset_parameters()
    assert (weight == 7.0).all()

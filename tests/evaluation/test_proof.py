"""A budget that does not act is found out, whatever the reason."""

from typing import Any

import pytest
import torch

from heedful.attention.eviction import POLICIES, Eviction
from heedful.evaluation.proof import prove_budget
from heedful.hf import HeedfulConfig, HeedfulForCausalLM


def make_model(**more: Any) -> HeedfulForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = HeedfulForCausalLM(HeedfulConfig(**sizes, **{"score": "selective", **more})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_is_proved(policy: str):
    proof = prove_budget(make_model(), 8, policy)
    assert proof.eviction == Eviction(8, policy)
    assert (proof.read, proof.held, proof.evicted) == (47, (8, 8), (39, 39))
    assert proof.nbytes < proof.full_bytes / 2 and proof.difference < 1e-4 < 0.1 < proof.effect


def test_what_is_saved_is_proved():
    """In either config; sampling, penalties and an end of text that are saved beside it are set aside."""
    model = make_model(eviction={"budget": 9})
    assert prove_budget(model).held == (9, 9)
    own = model.generation_config
    own.kv_budget = 7
    own.do_sample, own.repetition_penalty, own.eos_token_id = True, 3.0, [*range(50)]
    proof = prove_budget(model)
    assert proof.held == (7, 7) and proof.generated == 24
    assert model.generation_config is own


def test_half_precision_is_proved_in_float32():
    assert prove_budget(make_model().bfloat16(), 8).difference < 1e-4


def test_a_threshold_alone():
    model = make_model()
    assert any(prove_budget(model, Eviction(threshold=1e-3)).evicted)
    with pytest.raises(ValueError, match="nothing was evicted in 55 tokens: no token had more than 1e"):
        prove_budget(model, Eviction(threshold=1e9))


def test_a_model_of_few_positions():
    model = make_model(positions="learned", max_position_embeddings=40)
    assert prove_budget(model, 30).evicted == (9, 9)
    with pytest.raises(ValueError, match="can never be exceeded: the model reads 40 tokens at most"):
        prove_budget(model, 39)


def test_a_budget_that_is_ignored(monkeypatch: pytest.MonkeyPatch):
    model = make_model()
    full = model.new_cache(Eviction())
    monkeypatch.setattr(model, "new_cache", lambda eviction: full)
    with pytest.raises(ValueError, match="nothing was evicted in 47 tokens; the budget is not active"):
        prove_budget(model, 8)


def test_a_budget_that_one_layer_ignores(monkeypatch: pytest.MonkeyPatch):
    model = make_model()
    half = model.new_cache(Eviction((8, 12)))
    monkeypatch.setattr(model, "new_cache", lambda eviction: half)
    with pytest.raises(ValueError, match="layer 1 holds 12 tokens, more than the 8 that it may"):
        prove_budget(model, 8)


def test_a_token_that_goes_wrongly(monkeypatch: pytest.MonkeyPatch):
    """Decoding lets the newest go, where the mask lets the oldest."""
    monkeypatch.setattr(
        "heedful.attention.eviction.cache.least_needed_slot",
        lambda priority, positions, *rest: positions.argmax(-1, keepdim=True),
    )
    with pytest.raises(
        ValueError, match="generating disagrees with one pass with the eviction mask: after 1 of 24"
    ):
        prove_budget(make_model(), 8, "streaming")

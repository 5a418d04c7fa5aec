"""Models all of whose layers have a sliding window: the window is part of the stepwise rule, beside the budget."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.converted.test_families import let_them_vote, loaded
from torch import Tensor
from transformers import AutoModelForCausalLM

import heedful
from heedful.adaptation.run import check_adaptable
from heedful.attention.eviction import Eviction
from heedful.cli import main
from heedful.hf.converted.window import masks_of
from heedful.hf.names import CACHE, output_cache

WINDOW = 6
ALL_SLIDE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "gemma2": {"layer_types": ["sliding_attention"] * 3},
}
HOWS: dict[str, dict[str, Any]] = {
    "votes": {"selector": "added", "subtract": True},
    "apart": {"selector": "added", "subtract": True, "per": "kv_head"},
    "retention": {},
    "nobody": {"score": "softmax"},
    "simulated": {"selector": "added", "subtract": True, "attention": "sas"},
}
families = pytest.mark.parametrize("family", ALL_SLIDE)


@pytest.fixture
def patched(make_source: Callable[..., Any]) -> Callable[..., Any]:
    def patch(family: str, **how: Any) -> Any:
        return heedful.patch(make_source(family, **ALL_SLIDE[family]), **{"select_dim": 4, **how})

    return patch


@families
def test_converted_it_is_its_source_and_back(
    family: str, save_source: Callable[..., Path], tmp_path: Path, ids: Tensor
):
    source = save_source(family, **ALL_SLIDE[family])
    stock = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    model = loaded(heedful.convert(source, tmp_path / "out", select_dim=4))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        for more in ({}, {"attention_mask": mask}):
            real = mask.bool() if more else torch.ones_like(ids).bool()
            expected = stock(ids, **more).logits[real]
            for use_cache in (True, False):
                got = model(ids, **more, use_cache=use_cache).logits[real]
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        how = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
        output = model.generate(ids, return_dict_in_generate=True, **how)
        assert torch.equal(stock.generate(ids, **how), output.sequences)
    assert output_cache(output).kept == [WINDOW] * 3
    heedful.convert(tmp_path / "out", tmp_path / "back", back=True)
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(("family", "how"), [*zip(ALL_SLIDE, HOWS, strict=False), ("mistral", "simulated")])
@pytest.mark.parametrize("budget", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_all_ways_of_running_agree(
    family: str, how: str, budget: int | None, patched: Callable[..., Any], ids: Tensor
):
    model = patched(family, **HOWS[how])
    let_them_vote(model)
    policy = "streaming" if how == "nobody" else "selective"
    eviction = Eviction(budget, policy, grace=1 if budget is None else 2)
    held = {"kv_budget": eviction}
    with torch.no_grad():
        logits = model(ids, **{CACHE: model.new_cache(eviction)}).logits
        full = model(ids, use_cache=False).logits
        assert (budget is None) == torch.allclose(logits, full, rtol=1e-4, atol=1e-4)
        for chunk in (1, 5):
            cache, parts = model.new_cache(eviction), []
            for start in range(0, ids.shape[1], chunk):
                parts.append(model(ids[:, start : start + chunk], **{CACHE: cache}).logits)
            torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-4, atol=1e-4)
            assert cache.kept == [budget or WINDOW] * 3
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        padded = model(ids, **inputs, **{CACHE: model.new_cache(eviction)}).logits
        alone = model(ids[1:, 6:], **{CACHE: model.new_cache(eviction)}).logits
        torch.testing.assert_close(padded[1:, 6:], alone, rtol=1e-4, atol=1e-4)
        sequence = model.generate(ids[:1], max_new_tokens=6, do_sample=False, **held)
        again = model(sequence, **{CACHE: model.new_cache(eviction)}).logits
        assert torch.equal(again[0, ids.shape[1] - 1 : -1].argmax(-1), sequence[0, ids.shape[1] :])
    nll = model.evaluate_nll(ids, reduction="none", **held)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(nll, expected)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_votes_are_trained_and_documents_stay_apart(
    family: str, patched: Callable[..., Any], make_source: Callable[..., Any], ids: Tensor
):
    model = patched(family, **HOWS["apart"])
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    with torch.no_grad():
        packed = model(ids[:1], position_ids=positions).logits
        stock = make_source(family, **ALL_SLIDE[family])
        stock.set_attn_implementation("eager")  # with sdpa transformers 5.17 leaves Gemma 2's softcap out
        expected = stock(ids[:1], position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)
    let_them_vote(model)
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if ".score.select" in name]
    assert len(grads) == 12 and all(g is not None and bool(g.abs().sum() > 0) for g in grads)


@pytest.mark.parametrize("policy", ["h2o", "tova", "random"])
def test_other_policies(policy: str, patched: Callable[..., Any], ids: Tensor):
    model, eviction = patched("mistral", score="softmax"), Eviction(4, policy)
    whole, parts = model.new_cache(eviction), model.new_cache(eviction)
    with torch.no_grad():
        logits = model(ids, **{CACHE: whole}).logits
        by_one = [model(ids[:, i : i + 1], **{CACHE: parts}).logits for i in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(by_one, 1), logits, rtol=1e-4, atol=1e-4)
    assert whole.kept == parts.kept == [4, 4, 4]


def test_an_assistant(patched: Callable[..., Any], ids: Tensor):
    """Tokens that are taken back come back to where the window has not reached."""
    plain = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    main, assistant = patched("mistral"), patched("phi3")
    let_them_vote(main)
    for held in ({}, {"kv_budget": 4}):
        alone = main.generate(ids[:1], **plain, **held)
        assert torch.equal(main.generate(ids[:1], assistant_model=assistant, **plain, **held), alone)


def test_what_the_window_hides_is_not_lost(patched: Callable[..., Any], ids: Tensor):
    """Nobody has votes against it: only the window lets tokens go, which the source does not see either."""
    model = patched("mistral", **HOWS["votes"])
    for chunk in (24, 1):
        cache = model.new_cache(Eviction(threshold=1e-3))
        with torch.no_grad():
            for start in range(0, 24, chunk):
                model(ids[:, start : start + chunk], **{CACHE: cache})
        assert cache.kept == [WINDOW] * 3
        assert all(torch.equal(bound, torch.zeros(2)) for bound in cache.forgotten)


def test_masks_that_say_otherwise_are_refused(patched: Callable[..., Any], ids: Tensor):
    with pytest.raises(ValueError, match="a layer with a sliding window of 6 attends causally"):
        patched("mistral")(ids, attention_mask=torch.ones(2, 1, 24, 24, dtype=torch.bool))


def test_what_convert_says(
    save_source: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["convert", str(save_source("mistral", **ALL_SLIDE["mistral"])), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "its layers hold 6 tokens, their sliding window" in said and "adapt" not in said


def test_adaptation_is_refused(patched: Callable[..., Any]):
    """The attention to come that its selectors learn from would be that of all later queries."""
    with pytest.raises(ValueError, match="out has a sliding window in every layer"):
        check_adaptable(patched("mistral"), Path("out"), lora=2)


def test_masks_are_read_off():
    row = torch.arange(9)
    segments, real = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]]), torch.ones(1, 9, dtype=torch.bool)
    seen = (row <= row[:, None]) & (row[:, None] - row < 3)
    assert masks_of(seen[None, None], 2, 9, 3) == (None, None)
    apart = seen & (segments[0][:, None] == segments[0])
    key_mask, ids = masks_of(apart[None, None], 1, 9, 3)
    assert key_mask is None and ids is not None and torch.equal(ids, segments)
    real[0, :2] = False
    key_mask, ids = masks_of((seen & real)[None, None], 1, 9, 3)
    assert ids is None and key_mask is not None and torch.equal(key_mask, real)

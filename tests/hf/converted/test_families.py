"""Every family: converted it is its source; under a budget all ways of running agree; back it is bit for bit."""

import filecmp
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.converted.conftest import SPECS
from torch import Tensor
from transformers import AutoModelForCausalLM

import heedful
from heedful.attention.eviction import Eviction
from heedful.hf.converted.model import attention_layers
from heedful.hf.names import CACHE, output_cache

HOWS: dict[str, dict[str, Any]] = {
    "retention": {"select_dim": 4},
    "retention, apart": {"select_dim": 4, "per": "kv_head"},
    "votes": {"select_dim": 4, "selector": "added"},
    "votes, apart": {"select_dim": 4, "selector": "added", "per": "kv_head"},
    "votes that are subtracted": {"select_dim": 4, "selector": "added", "subtract": True},
    "nobody votes": {"score": "softmax"},
    "simulated heads": {"attention": "sas", "attention_options": {"sim_heads": 8}, "select_dim": 4},
    "wide simulated heads, apart": {
        "attention": "sas",
        "attention_options": {"sim_head_dim": 12, "kernel_size": 1},
        **{"select_dim": 4, "per": "kv_head"},
    },
}
AT_ONCE = "retention", "simulated heads"
"""What `make test` runs; all of them run in `make test-slow`."""
families = pytest.mark.parametrize("family", SPECS)


def loaded(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def let_them_vote(model: Any, seed: int = 3) -> None:
    """Selectors with votes of all sizes, simulated heads that are no copies."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in attention_layers(model):
            for name, weight in module.named_parameters():
                if ".retain." in f".{name}" and weight.ndim == 2:
                    weight.copy_(torch.randn(weight.shape, generator=generator))
                elif "select_" in name and weight.ndim == 2:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
        for name, parameter in model.named_parameters():
            if ".sas." in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1


@families
@pytest.mark.parametrize(
    "how", [how if how in AT_ONCE else pytest.param(how, marks=pytest.mark.slow) for how in HOWS]
)
def test_converted_it_is_its_source(
    family: str, how: str, save_source: Callable[..., Path], tmp_path: Path, ids: Tensor
):
    source = save_source(family)
    # the reference: transformers' other attentions left out the cap of logits at times
    stock = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    model = loaded(heedful.convert(source, tmp_path / "out", **HOWS[how]))
    assert type(model).__name__ == f"Heedful{type(stock).__name__}"
    assert model.config.model_type == f"heedful_{family}"
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        for more in ({}, {"attention_mask": mask}):
            real = mask.bool() if more else torch.ones_like(ids).bool()
            expected, got = stock(ids, **more).logits[real], model(ids, **more).logits[real]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
        assert torch.equal(stock.generate(ids, **settings), model.generate(ids, **settings))


FEW = "gemma2", "phi3", "gpt2"
"""Families that differ most: capped logits and windows, half a rotation, no rotation."""


@pytest.mark.parametrize(
    ("family", "how"),
    [
        pytest.param(family, how, marks=[] if at_once else pytest.mark.slow)
        for family in SPECS
        for how, at_once in (
            ("retention, apart", True),
            ("wide simulated heads, apart", family in FEW),
            *(
                (how, False)
                for how in ("retention", "votes, apart", "votes that are subtracted", "simulated heads")
            ),
        )
    ],
)
def test_under_a_budget_all_ways_of_running_agree(
    family: str, how: str, save_source: Callable[..., Path], tmp_path: Path, ids: Tensor
):
    """In parallel, in chunks, token by token, beside a padded row, in `generate`; and the budget does act."""
    model = loaded(heedful.convert(save_source(family), tmp_path / "out", **HOWS[how]))
    let_them_vote(model)
    held = {"kv_budget": 9, "kv_grace": 3, "kv_first": 2}
    eviction = Eviction(9, grace=3, first=2)
    with torch.no_grad():
        logits = model(ids, **{CACHE: model.new_cache(eviction)}).logits
        full = model(ids).logits
        assert (logits[:, 12:] - full[:, 12:]).abs().max() > 1e-3
        for chunk in (1, 5):
            cache, parts = model.new_cache(eviction), []
            for start in range(0, ids.shape[1], chunk):
                parts.append(model(ids[:, start : start + chunk], **{CACHE: cache}).logits)
                assert all(kept <= 9 for kept in cache.kept)
            torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-4, atol=1e-4)
            assert sum(cache.stats.evictions) > 0
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        padded = model(ids, **inputs, **{CACHE: model.new_cache(eviction)}).logits
        alone = model(ids[1:, 6:], **{CACHE: model.new_cache(eviction)}).logits
        torch.testing.assert_close(padded[1:, 6:], alone, rtol=1e-4, atol=1e-4)
        output = model.generate(
            ids[:1], max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **held
        )
        assert all(kept <= 9 for kept in output_cache(output).kept)
        sequence = output.sequences
        again = model(sequence, **{CACHE: model.new_cache(eviction)}).logits
        assert torch.equal(again[0, ids.shape[1] - 1 : -1].argmax(-1), sequence[0, ids.shape[1] :])
    nll = model.evaluate_nll(ids, reduction="none", **held)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(nll, expected)


@families
@pytest.mark.parametrize("shard", [pytest.param("5GB", marks=pytest.mark.slow), "20KB"])
def test_back_it_is_bit_for_bit(family: str, shard: str, save_source: Callable[..., Path], tmp_path: Path):
    source = save_source(family, shard=shard)
    heedful.convert(
        source,
        tmp_path / "out",
        per="kv_head",
        selector="added",
        select_dim=4,
        eviction=Eviction(64, grace=8),
    )
    heedful.convert(tmp_path / "out", tmp_path / "back", back=True)
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == names
    assert all(
        filecmp.cmp(source / n, tmp_path / "back" / n, False) for n in names if n.endswith(".safetensors")
    )
    for name in ("config.json", "generation_config.json"):
        assert json.loads((source / name).read_text()) == json.loads((tmp_path / "back" / name).read_text())


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_fine_tuned_weights_go_back_and_selection_heads_are_dropped(
    family: str, save_source: Callable[..., Path], tmp_path: Path, ids: Tensor
):
    source = save_source(family)
    how: dict[str, Any] = HOWS["votes that are subtracted"]
    model = loaded(heedful.convert(source, tmp_path / "out", **how))
    let_them_vote(model)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    before = model(ids, labels=ids).loss
    before.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".score." in name)
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "tuned")
    assert loaded(tmp_path / "tuned")(ids, labels=ids).loss < before
    heedful.convert(tmp_path / "tuned", tmp_path / "back", back=True)
    stock = loaded(tmp_path / "back")
    assert type(stock).__name__ == type(model).__name__.removeprefix("Heedful")
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in stock.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_head_zero_votes_as_in_the_paper(
    family: str, save_source: Callable[..., Path], tmp_path: Path, ids: Tensor
):
    """Nothing is added, and the model changes at once."""
    source = save_source(family)
    model = loaded(heedful.convert(source, tmp_path / "out", selector="head"))
    stock = AutoModelForCausalLM.from_pretrained(source).eval()
    assert model.num_parameters() == stock.num_parameters()
    with torch.no_grad():
        assert (model(ids).logits - stock(ids).logits).abs().max() > 0.1


def test_gradients_reach_votes_through_every_layer(make_source: Callable[..., Any], ids: Tensor):
    model = heedful.patch(make_source("qwen3"), per="kv_head", **HOWS["votes that are subtracted"])
    let_them_vote(model)
    model.train()(ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if ".score.select" in name]
    assert len(grads) == 12 and all(g is not None and bool(g.abs().sum() > 0) for g in grads)


@families
def test_it_says_what_it_takes(family: str, make_source: Callable[..., Any]):
    """`generate` and `Trainer` ask the signature."""
    stock, model = make_source(family), heedful.patch(make_source(family), select_dim=4)
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)

"""Simulated heads in a converted model; that they are the source at first and hold a budget is in test_families."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.converted.conftest import SPECS
from tests.hf.converted.test_families import let_them_vote, loaded
from torch import Tensor
from transformers import AutoModelForCausalLM

import heedful
from heedful.cli import main
from heedful.hf.converted import once
from heedful.hf.converted.model import attention_layers
from heedful.hf.converted.sas import turn
from heedful.hf.names import CACHE

SAS: dict[str, Any] = {"attention": "sas", "select_dim": 4}


def simulated(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if ".sas." in name}


@pytest.mark.parametrize("family", [family for family in SPECS if family != "gpt2"])
@pytest.mark.parametrize("wide", [12, pytest.param(None, marks=pytest.mark.slow)])
def test_only_how_far_tokens_are_apart_matters(
    family: str, wide: int | None, make_source: Callable[..., Any], ids: Tensor
):
    """An expansion of rotated features would break that; GPT-2 has no rotation."""
    model = heedful.patch(make_source(family), **SAS, attention_options={"sim_head_dim": wide})
    let_them_vote(model)
    with torch.no_grad():
        here, stock = model(ids, use_cache=False).logits, make_source(family)(ids).logits
        later = model(ids, position_ids=torch.arange(24)[None].expand(2, -1) + 50, use_cache=False).logits
    assert (here - stock).abs().max() > 0.1
    torch.testing.assert_close(later, here, rtol=1e-4, atol=1e-4)


def test_a_rotation_is_taken_back():
    """Of some of the features, stretched."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator)
    angles = torch.randn(1, 5, 3, generator=generator).repeat(1, 1, 2)
    rotation = 1.3 * angles.cos(), 1.3 * angles.sin()
    turned = turn(x, rotation)
    assert not torch.allclose(turned[..., :6], x[..., :6]) and torch.equal(turned[..., 6:], x[..., 6:])
    torch.testing.assert_close(turn(turned, rotation, back=True), x)


@pytest.mark.parametrize("options", [{}, {"sim_head_dim": 12}])
def test_every_simulated_head_learns_something_of_its_own(
    options: dict[str, Any], make_source: Callable[..., Any], ids: Tensor
):
    """Equal copies got equal gradients, and stayed equal for ever."""
    model = heedful.patch(make_source("llama"), **SAS, attention_options=options)
    at_first = {name: parameter.detach().clone() for name, parameter in simulated(model).items()}
    optimizer = torch.optim.Adam(simulated(model).values(), lr=1e-3)
    before = model(ids, labels=ids).loss
    for _ in range(2):  # what is behind a zero gets its gradient in the second step
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert model(ids, labels=ids).loss < before
    for name, parameter in simulated(model).items():
        learned = (parameter - at_first[name]).detach()
        assert learned.abs().max() > 0, name
        if name.endswith(("q.conv1", "q.conv2", "k.conv1", "k.conv2")):
            copies = learned.unflatten(0, (3, -1)).flatten(1)
            assert (copies - copies.mean(0)).norm() > 0.1 * copies.norm(), name


def test_queries_and_keys_are_copies_to_the_last_bit(make_source: Callable[..., Any]):
    model = heedful.patch(make_source("llama").bfloat16(), **SAS)
    sas = attention_layers(model)[0].sas
    q, k, v = (torch.randn(2, heads, 5, 8).bfloat16() for heads in (4, 2, 2))
    angles = torch.randn(1, 5, 4).repeat(1, 1, 2)
    rotation = angles.cos().bfloat16(), angles.sin().bfloat16()
    wide_q, wide_k, wide_v = sas(q, k, v, rotation)
    assert torch.equal(wide_q, q.repeat(1, 3, 1, 1)) and torch.equal(wide_k, k.repeat(1, 3, 1, 1))
    assert not torch.allclose(wide_v, v.repeat(1, 3, 1, 1), atol=0.1)
    torch.testing.assert_close(wide_v.unflatten(1, (3, 2)).float().mean(1), v.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("sim_heads", [4, 8, 12, 28])
def test_weights_of_16_bits_are_the_source_in_float32(
    sim_heads: int, make_source: Callable[..., Any], tmp_path: Path, ids: Tensor
):
    """The amounts by which values start apart still had a sum of zero, but for their rounding."""
    make_source("llama").bfloat16().save_pretrained(tmp_path / "source")
    options = {"attention_options": {"sim_heads": sim_heads}}
    out = heedful.convert(tmp_path / "source", tmp_path / "out", **SAS, **options)
    stock, model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "source", out)
    )
    with torch.no_grad():
        expected = stock(ids).logits
        torch.testing.assert_close(
            model(ids).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )
    apart = attention_layers(model)[0].sas.v.conv1.detach()
    if sim_heads > 4:
        assert 0.5 < apart.norm(dim=(1, 2)).mean() < 2


def test_what_was_trained_is_saved(save_source: Callable[..., Path], tmp_path: Path, ids: Tensor):
    out = heedful.convert(save_source("qwen2"), tmp_path / "out", **SAS, attention_options={"sim_heads": 8})
    model = loaded(out)
    layers = attention_layers(model)
    assert [layer.sas is None for layer in layers] == [False, True, True]  # two have windows
    let_them_vote(model)
    model.save_pretrained(tmp_path / "tuned")
    again = loaded(tmp_path / "tuned")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert json.loads((out / "config.json").read_text())["heedful"]["attention_options"] == {"sim_heads": 8}


def test_for_one_call_of_a_stock_model(save_source: Callable[..., Path], tmp_path: Path, ids: Tensor):
    """`custom_generate` takes simulated heads, too, from a converted folder, and leaves none behind."""
    source = save_source("llama")
    model = loaded(heedful.convert(source, tmp_path / "out", **SAS))
    let_them_vote(model)
    model.save_pretrained(tmp_path / "tuned")
    stock, how = loaded(source), {"max_new_tokens": 6, "do_sample": False, "kv_budget": 9}
    expected, before = model.generate(ids, **how), stock.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(once.generate(stock, inputs=ids, kv_from=tmp_path / "tuned", **how), expected)
    assert torch.equal(stock.generate(ids, max_new_tokens=6, do_sample=False), before)
    assert not torch.equal(before, expected)


def test_they_take_more_cache(make_source: Callable[..., Any], ids: Tensor):
    sizes = []
    for how in ({}, {"attention": "sas"}, {"attention": "sas", "attention_options": {"sim_head_dim": 16}}):
        model = heedful.patch(make_source("llama"), score="softmax", **how)
        cache = model.new_cache()
        with torch.no_grad():
            model(ids, **{CACHE: cache})
        sizes.append(sum(memory.used_bytes for memory in cache.memories))
    assert sizes == [sizes[0], 3 * sizes[0], 4.5 * sizes[0]]


def test_gains_of_a_norm_bound_nothing_after_it(make_source: Callable[..., Any]):
    model = heedful.patch(make_source("qwen3"), **SAS)
    layer, real = attention_layers(model)[0], torch.ones(1, 1, dtype=torch.bool)
    q, k = torch.ones(1, 12, 1, 8), torch.zeros(1, 6, 1, 8)
    expected = torch.tensor([[8**0.5 * layer.scale**0.5, 0.0]])
    torch.testing.assert_close(layer.logit_sizes(q, k, real, real), expected)


def test_back_says_what_is_lost(
    save_source: Callable[..., Path], tmp_path: Path, ids: Tensor, capsys: pytest.CaptureFixture[str]
):
    source, out = save_source("llama"), tmp_path / "out"
    assert main(["convert", str(source), str(out), "--attention", "sas", "--attention.kernel-size", "1"]) == 0
    said = capsys.readouterr().out
    assert "its 12 simulated heads are copies of 4 until they are trained" in said
    assert "takes 3 times the cache of the source" in said
    model = loaded(out)
    assert sum(p.numel() for p in simulated(model).values()) == 3 * (12 * (4 + 12 + 2) + 2 * 6 * (2 + 6 + 2))
    let_them_vote(model)
    with torch.no_grad():
        model.lm_head.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    assert main(["convert", str(tmp_path / "tuned"), str(tmp_path / "back"), "--back"]) == 0
    said = capsys.readouterr().out
    assert "1,008 parameters of simulated heads" in said and "have learned is lost" in said
    stock, own = loaded(tmp_path / "back"), model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in stock.state_dict().items())
    assert not any(".sas." in name or ".score." in name for name in stock.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "gqa"}, "attention must be 'source' or 'sas', got 'gqa'"),
        ({"attention_options": {"sim_heads": 8}}, "attention 'source' has no option 'sim_heads'"),
        ({"attention": "sas", "attention_options": {"sim_head": 8}}, "did you mean 'sim_heads'"),
        ({"attention": "sas", "attention_options": {"sim_heads": 6}}, "must be a multiple of n_heads"),
        (
            {"attention": "sas", "attention_options": {"sim_head_dim": 7}},
            "at least the head_dim of the source",
        ),
        ({"attention": "sas", "attention_options": {"kernel_size": 2}}, "kernel_size must be odd"),
        ({"attention": "sas", "attention_options": {"kernel_size": "3"}}, "must be a whole number"),
    ],
)
def test_unsound_options(
    options: dict[str, Any], message: str, save_source: Callable[..., Path], tmp_path: Path
):
    with pytest.raises(ValueError, match=message) as raised:
        heedful.convert(save_source("llama"), tmp_path / "out", **options)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_an_unsound_saved_model_is_refused(save_source: Callable[..., Path], tmp_path: Path):
    out = heedful.convert(save_source("llama"), tmp_path / "out", **SAS)
    config = json.loads((out / "config.json").read_text())
    for options, message in (
        ({"sim_heads": 7}, "multiple of n_heads"),
        ({"wide": 1}, "has no option 'wide'"),
    ):
        config["heedful"]["attention_options"] = options
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            heedful.load(out)

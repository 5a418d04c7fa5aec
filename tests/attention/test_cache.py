"""LayerCache: what it holds, what it costs, beam search, gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.attention import Attention, LayerCache, build

FORMS: dict[str, Callable[[], Attention]] = {
    "mha-softmax": lambda: build("mha", d_model=32, n_heads=4, init_logit_std=1.0).double(),
    "gqa-selective": lambda: build(
        "gqa", "selective", d_model=32, n_heads=4, n_kv_heads=2, init_logit_std=1.0
    ).double(),
    "sas-selective": lambda: build("sas", "selective", d_model=32, n_heads=4, init_logit_std=1.0).double(),
    "sas-compact": lambda: build("sas", "selective", d_model=32, n_heads=4, cache="compact").double(),
}
form = pytest.mark.parametrize("form", FORMS)


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randn(batch, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def fill(batch: int, length: int, value: float = 0.0) -> dict[str, Tensor]:
    return {
        "k": torch.full((batch, 3, length, 4), value),
        "positions": torch.full((batch, length), int(value)),
    }


def test_append_returns_everything_so_far():
    cache = LayerCache(block=4)
    sizes = [1, 3, 2, 5, 1]
    for n, size in enumerate(sizes):
        got = cache.append(**fill(2, size, float(n)))
        expected = [value for m, many in enumerate(sizes[: n + 1]) for value in [m] * many]
        assert got["k"].shape == (2, 3, sum(sizes[: n + 1]), 4)
        assert got["k"][1, 2, :, 3].tolist() == expected
        assert got["positions"][0].tolist() == expected
        assert torch.equal(cache["k"], got["k"])
    assert cache.seen == cache.kept == sum(sizes)


@torch.no_grad()
def test_storage_grows_in_blocks():
    cache = LayerCache(block=8)
    cache.append(**fill(2, 3))
    per_token = 3 * 4 * 4 + 8
    assert cache.nbytes == 2 * 8 * per_token
    assert cache.used_bytes == 2 * 3 * per_token
    where = cache["k"].data_ptr()
    cache.append(**fill(2, 5))
    assert cache["k"].data_ptr() == where, "storage moved although there was room"
    cache.append(**fill(2, 1))
    assert cache.nbytes == 2 * 16 * per_token
    cache.reset()
    assert (cache.seen, cache.nbytes, cache.masks, cache.state) == (0, 0, {}, {})
    assert cache.append(**fill(5, 2))["k"].shape == (5, 3, 2, 4)


def test_errors():
    cache = LayerCache()
    with pytest.raises(ValueError, match=r"as many tokens, got \{'k': 2, 'positions': 3\}"):
        cache.append(k=fill(2, 2)["k"], positions=fill(2, 3)["positions"])
    cache.append(**fill(2, 2))
    with pytest.raises(ValueError, match=r"the cache holds \['k', 'positions'\], got \['k'\]"):
        cache.append(k=fill(2, 1)["k"])
    with pytest.raises(ValueError, match=r"holds 2 sequences but got 3 new ones; use one cache per batch"):
        cache.append(**fill(3, 1))


@form
def test_prefill_leaves_nothing_quadratic(form: str):
    """After a long prompt the cache holds its tokens and no (T, S) tensor behind a view."""
    module, cache = FORMS[form](), LayerCache(block=1)
    with torch.no_grad():
        module(tokens(1, 200), cache=cache)
    assert cache.nbytes == cache.used_bytes
    assert cache.used_bytes <= 200 * 2 * module.config.cache_bytes_per_token(8)


@form
def test_reorder_and_repeat(form: str):
    """Beam search: rows move or multiply between two calls, with their padding and their votes."""
    module, x = FORMS[form](), tokens(3, 9)
    mask = torch.arange(9) >= torch.tensor([[0], [2], [4]])
    rows = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        cache = LayerCache(block=4)
        module(x[:, :6], key_mask=mask[:, :6], cache=cache)
        cache.reorder(rows)
        got = [module(x[rows, 6:8], cache=cache)]
        cache.repeat(2)
        twice = rows.repeat_interleave(2)
        got.append(module(x[twice, 8:], cache=cache))
        full = module(x, key_mask=mask)
    torch.testing.assert_close(got[0], full[rows, 6:8], rtol=0, atol=1e-10)
    torch.testing.assert_close(got[1], full[twice, 8:], rtol=0, atol=1e-10)


@form
@pytest.mark.parametrize(
    "frozen", [[], ["k_proj"], ["v_proj"], ["k_proj", "k_norm", "k_expand", "v_proj", "v_expand"]], ids=str
)
def test_gradients_through_a_cache(form: str, frozen: list[str]):
    """Training through pieces gives the gradients of the whole sequence, also when parts are frozen."""
    module, x = FORMS[form](), tokens()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in frozen)
    wanted = [p for p in module.parameters() if p.requires_grad]
    expected = torch.autograd.grad(module(x).square().sum(), wanted)
    cache = LayerCache(block=16)
    outs = [module(piece, cache=cache) for piece in x.split([4, 1, 2, 2], dim=1)]
    got = torch.autograd.grad(torch.cat(outs, dim=1).square().sum(), wanted)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@form
@pytest.mark.parametrize("first", [True, False], ids=["train-then-eval", "eval-then-train"])
def test_grad_mode_may_change(form: str, first: bool):
    module, x, cache = FORMS[form](), tokens(), LayerCache(block=4)
    outs = []
    for n, piece in enumerate(x.split([4, 1, 2, 2], dim=1)):
        with torch.set_grad_enabled(first == (n < 2)):
            outs.append(module(piece, cache=cache))
    torch.testing.assert_close(torch.cat(outs, dim=1), module(x), rtol=0, atol=1e-10)


@form
def test_inference_mode(form: str):
    module, x, cache = FORMS[form](), tokens(), LayerCache(block=4)
    with torch.inference_mode():
        outs = [module(piece, cache=cache) for piece in x.split(2, dim=1)]
        torch.testing.assert_close(torch.cat(outs, dim=1), module(x), rtol=0, atol=1e-10)


@form
@pytest.mark.parametrize("missing", ["before", "after", "between"])
def test_padding_given_for_some_calls_only(form: str, missing: str):
    """Calls without a mask bring real tokens."""
    module, x = FORMS[form](), tokens()
    mask = torch.ones(2, 9, dtype=torch.bool)
    given = {"before": [False, False, True], "after": [True, False, False], "between": [True, False, True]}[
        missing
    ]
    cache, outs = LayerCache(block=4), []
    for n, (start, has_mask) in enumerate(zip((0, 3, 6), given, strict=True)):
        part = slice(start, start + 3)
        if has_mask:
            mask[0, start : start + 1 + n % 2] = False
        options: dict[str, Any] = {"key_mask": mask[:, part]} if has_mask else {}
        outs.append(module(x[:, part], cache=cache, **options))
    expected = module(x, key_mask=mask)
    torch.testing.assert_close(torch.cat(outs, dim=1)[mask], expected[mask], rtol=0, atol=1e-10)


def test_explicit_positions_are_used():
    module, x = FORMS["sas-compact"](), tokens()
    at = torch.arange(9)[None] * 3
    cache = LayerCache(block=4)
    outs = [module(x[:, a:b], positions=at[:, a:b], cache=cache) for a, b in ((0, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(outs, dim=1), module(x, positions=at), rtol=0, atol=1e-10)
    assert not torch.allclose(module(x, positions=at), module(x))


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x axes": ({"x": torch.zeros(3, 32)}, ValueError, r"x must have shape \(B, T, C\), got \(3, 32\)"),
    "x width": ({"x": torch.zeros(2, 3, 31)}, ValueError, r"\(2, 3, 32\), got \(2, 3, 31\)"),
    "mask dtype": ({"key_mask": torch.ones(2, 3)}, TypeError, r"key_mask must be bool \(True = real token\)"),
    "mask shape": (
        {"key_mask": torch.ones(2, 4, dtype=torch.bool)},
        ValueError,
        r"key_mask must have shape \(B, T\) = \(2, 3\), got \(2, 4\)",
    ),
    "segments shape": (
        {"segment_ids": torch.ones(1, 3, dtype=torch.long)},
        ValueError,
        r"segment_ids must have shape \(B, T\) = \(2, 3\), got \(1, 3\)",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_refused_call_leaves_the_cache_alone(case: str):
    options, exception, message = MISTAKES[case]
    module, cache = build("mha", "selective", d_model=32, n_heads=4), LayerCache()
    x = torch.zeros(2, 3, 32)
    module(x, cache=cache)
    with pytest.raises(exception, match=message):
        module(**{"x": x, **options}, cache=cache)
    assert (cache.seen, cache.masks) == (3, {})
    with pytest.raises(ValueError, match="holds 2 sequences but got 1"):
        module(x[:1], cache=cache)
    assert cache.seen == 3

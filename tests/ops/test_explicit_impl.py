"""An implementation that is asked for by name runs, whatever the shape, or says why not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.attention.build import build
from heedful.attention.eviction import EvictingCache
from heedful.ops.causal import causal_attention
from heedful.ops.masks import visible_keys
from heedful.ops.native import status
from heedful.ops.selective import api, selective_attention
from heedful.ops.selective.api import attend_visible

SHAPES = {"one query": (1, 9), "chunk": (4, 9), "square": (9, 9)}
MASKS = ("none", "padding", "segments")


def inputs(shape: str, masks: str, selectors: int) -> dict[str, Any]:
    """Arguments of `selective_attention`, float64."""
    length, n_keys = SHAPES[shape]
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (length, n_keys, n_keys))
    given: dict[str, Any] = {"q": q, "k": k, "v": v}
    if masks == "padding":
        given["key_mask"] = torch.arange(n_keys).expand(2, -1) >= torch.tensor([[2], [0]])
    if masks == "segments":
        given["segment_ids"] = (torch.arange(n_keys) // 5).expand(2, -1)
    if selectors > 1:
        given |= {"select_q": q[:, :selectors].clone(), "select_k": k[:, :selectors].clone()}
    return given


@pytest.mark.parametrize("selectors", [1, 2])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["reference", "sdpa", "blocked"])
def test_exactly_that_one_runs(
    monkeypatch: pytest.MonkeyPatch, impl: str, shape: str, masks: str, selectors: int
) -> None:
    ran: list[str] = []

    def spy(name: str, run: Any) -> Any:
        return lambda *args: ran.append(name) or run(*args)

    given = inputs(shape, masks, selectors)
    expected = selective_attention(**given, impl="reference")
    for names in (api.BLOCKED, api.DENSE):
        for name, run in names.items():
            monkeypatch.setitem(names, name, spy(name, run))
    got = selective_attention(**given, impl=impl)
    assert ran == [impl]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given = {name: x.float() for name, x in inputs(shape, "none", 1).items()}
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here: .*(NVIDIA|not installed)"):
        selective_attention(**given, impl="triton")


@pytest.mark.parametrize("impl", ["blocked", "native", "triton"])
def test_ready_masks_want_a_form_that_takes_them(impl: str) -> None:
    given = inputs("chunk", "none", 1)
    q, k, v = given["q"], given["k"], given["v"]
    visible = visible_keys(4, 9, None, None, q.device)
    with pytest.raises(ValueError, match=rf"impl='{impl}' takes whole sequences only.*use impl='auto'"):
        attend_visible(q, k, v, None, visible, visible, 0.3, impl)


@pytest.mark.parametrize("impl", ["reference", "blocked", "fast"])
def test_causal_attention_knows_two(impl: str) -> None:
    x = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=f"impl must be 'auto' or 'sdpa', got '{impl}'"):
        causal_attention(x, x, x, 0.3, impl=impl)


def evicting(impl: str, pieces: tuple[int, ...]) -> Tensor:
    """The outputs of a layer under a budget of 5 tokens, read in pieces."""
    torch.manual_seed(0)
    attention = build("mha", score="selective", impl=impl, d_model=16, n_heads=2).double()
    x = torch.randn(2, sum(pieces), 16, dtype=torch.float64)
    cache = EvictingCache(5)
    with torch.no_grad():
        return torch.cat([attention(piece, cache=cache) for piece in x.split(list(pieces), dim=1)], dim=1)


@pytest.mark.parametrize("pieces", [(12,), (8, 1, 1, 1, 1)])
def test_under_a_budget(pieces: tuple[int, ...]) -> None:
    expected = evicting("reference", pieces)
    for impl in ("auto", "sdpa"):
        torch.testing.assert_close(evicting(impl, pieces), expected)
    for impl in ("blocked", "native"):
        with pytest.raises(ValueError, match=f"impl='{impl}' takes whole sequences only"):
            evicting(impl, pieces)


@pytest.mark.skipif(not status(torch.float64).active, reason=status(torch.float64).reason)
def test_the_native_operator_can_be_asked_for_in_a_config() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    outs = []
    for impl in ("reference", "native"):
        torch.manual_seed(0)
        attention = build("mha", score="selective", impl=impl, d_model=16, n_heads=2).double()
        outs.append(attention(x))
    torch.testing.assert_close(*outs)


def test_triton_can_be_asked_for_in_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    attention = build("mha", score="selective", impl="triton", d_model=16, n_heads=2)
    with pytest.raises(ValueError, match="impl='triton' cannot run here"):
        attention(torch.randn(1, 4, 16))

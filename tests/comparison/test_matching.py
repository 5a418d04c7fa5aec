"""Equal parameters or FLOPs within 1 %, or an error."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import DecoderConfig
from heedful.comparison import CompareSettings, match_d_ff

By = Literal["params", "flops"]


def cost(config: DecoderConfig, by: By, context: int) -> int:
    return config.parameter_count() if by == "params" else 3 * config.flops_per_token(context)


@pytest.mark.parametrize("by", ["params", "flops"])
@settings(max_examples=60)
@given(
    head_dim=st.sampled_from([4, 8, 12, 32, 64]),
    heads=st.sampled_from([1, 2, 4, 6, 12]),
    layers=st.integers(1, 6),
    vocab=st.integers(10, 5000),
    context=st.integers(2, 2048),
    forms=st.tuples(st.sampled_from(["mha", "mqa", "sas"]), st.sampled_from(["mha", "mqa", "sas"])),
    d_ff=st.none() | st.integers(1, 3000),
)
def test_within_a_percent_or_unreachable(
    by: By,
    head_dim: int,
    heads: int,
    layers: int,
    vocab: int,
    context: int,
    forms: tuple[str, str],
    d_ff: int | None,
):
    target = DecoderConfig(
        vocab_size=vocab,
        d_model=head_dim * heads,
        n_layers=layers,
        n_heads=heads,
        attention=forms[0],
        d_ff=d_ff,
        score="selective",
    )
    config = dataclasses.replace(target, attention=forms[1])
    wanted = cost(target, by, context)
    try:
        width = match_d_ff(config, target, by, context)
    except ValueError as error:
        # No width does: the narrowest costs too much, or one step of width is more than the tolerance.
        narrow, next_ = (cost(dataclasses.replace(config, d_ff=w), by, context) for w in (1, 2))
        assert narrow > 1.01 * wanted or next_ - narrow > 0.01 * wanted, error
        assert f"--match {by} cannot be reached" in str(error)
        return
    assert abs(cost(dataclasses.replace(config, d_ff=width), by, context) - wanted) <= 0.01 * wanted


def test_round_widths_where_they_will_do():
    small = {"vocab_size": 2048, "d_model": 128, "n_layers": 4, "n_heads": 4}
    target = DecoderConfig(**small, attention="sas")
    for by in ("params", "flops"):
        width = match_d_ff(DecoderConfig(**small, attention="mha"), target, by, 256)
        assert width > (target.d_ff or 0)
        assert width % 8 == 0


@pytest.mark.parametrize("by", ["params", "flops"])
def test_every_form_of_a_comparison(settings: Callable[..., CompareSettings], by: By):
    of: dict[str, Any] = {"d_model": 64, "n_heads": 4, "d_ff": 203, "attention": ("sas", "mha", "mqa")}
    forms = settings(match=by, score=("softmax", "selective"), **of).forms(257, 32)
    costs = [cost(f.to_config(257, 32).to_decoder_config(), by, 32) for f in forms]
    assert all(abs(c - costs[0]) <= 0.01 * costs[0] for c in costs)
    assert forms[0].d_ff == 203  # the first form stays as it is
    assert all(f.d_ff == 203 for f in forms if f.attention == "sas")
    assert len({f.d_ff for f in forms}) == 3


def test_unreachable(settings: Callable[..., CompareSettings]):
    message = (
        r"--match flops cannot be reached: sas x softmax costs [\d,]+ with the narrowest SwiGLU and mha x"
    )
    with pytest.raises(ValueError, match=message):
        settings(match="flops", d_ff=2, context=256)

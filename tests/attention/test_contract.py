"""Every attention x score keeps every promise of heedful.testing, and broken forms are caught."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from heedful import available
from heedful.attention import (
    Attention,
    AttentionConfig,
    GroupedQueryAttention,
    LayerCache,
    Score,
    ScoreConfig,
    SelectiveScore,
    SoftmaxScore,
    build,
    configure,
    option,
    register_attention,
    register_score,
)
from heedful.attention.cache import KVCache
from heedful.attention.eviction import EvictingCache
from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.testing import CHECKS, check_form

REQUIRED = {"gqa": {"n_kv_heads": 2}}
VARIANTS: dict[str, dict[str, Any]] = {
    "compact": {"cache": "compact"},
    "identity": {"init": "identity"},
    "gqa-host": {"n_kv_heads": 2},
    "gqa-host-compact": {"n_kv_heads": 2, "cache": "compact", "init": "identity"},
    "mlp": {"kernel_size": 1},
    "bias": {"bias": True},
    "no-norm": {"qk_norm": False},
    "no-rope": {"rope": False},
    "norm-after-rope": {"qk_norm_position": "after_rope", "cache": "compact"},
    "same-size": {"sim_heads": 4, "sim_head_dim": 8},
}
FORMS = {
    f"{attention}-{score}": (attention, score, REQUIRED.get(attention, {}))
    for attention in available()["attention"]
    for score in available()["score"]
}
PAIRS = set(FORMS)
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"sas-{name}": ("sas", options) for name, options in VARIANTS.items()},
    "mha-plain": ("mha", {"qk_norm": False, "rope": False, "bias": True}),
    "gqa-after": ("gqa", {"n_kv_heads": 2, "qk_norm_position": "after_rope"}),
    "mha-reference": ("mha", {"impl": "reference"}),
    "mla-sizes": ("mla", {"q_lora_rank": 6, "kv_lora_rank": 5, "rope_head_dim": 6, "bias": True}),
    "tpa-ranks": ("tpa", {"q_rank": 1, "k_rank": 3, "bias": True}),
    "sas_linear-host": (
        "sas_linear",
        {"n_kv_heads": 2, "init": "identity", "qk_norm_position": "after_rope"},
    ),
}
FORMS |= {
    f"{name}-{score}": (attention, score, options)
    for name, (attention, options) in OPTIONS.items()
    for score in available()["score"]
}

# Every attention with every score, and every option with one score; the product is among the exhaustive tests.
ONCE = PAIRS | {f"{name}-{score}" for name, score in zip(OPTIONS, cycle(available()["score"]), strict=False)}
# Each attention and each score with a usual counterpart, and every option; others among the exhaustive tests.
USUAL = {f for f in ONCE if f not in PAIRS or f.split("-")[0] == "gqa" or f.split("-")[-1] == "selective"}
# What a pair may break that its two forms keep with others.
FOR_EVERY_PAIR = {
    *("parameter_count_is_exact", "flops_are_exact", "cache_bytes_are_exact", "gradients_reach_everything"),
    *("evictions_are_stepwise", "cached_equals_full", "padding_content_is_ignored", "packed_equals_separate"),
}
# Compiling takes as long as all other checks of a form together.
COMPILED = {"gqa-selective"}
# One pair of each other form; all of them among the exhaustive tests.
COMPILED_TOO = {
    *("sas-selective", "mla-softmax", "tpa-gated", "mha-forgetting"),
}


def slow(form: str, check: str = "") -> list[pytest.MarkDecorator]:
    among = COMPILED if check == "compiled_equals_eager" else ONCE
    if check == "compiled_equals_eager" and form in COMPILED_TOO:
        return [pytest.mark.slow]
    if form in PAIRS - USUAL and check not in FOR_EVERY_PAIR | {""}:
        return [pytest.mark.exhaustive]
    return [] if form in among else [pytest.mark.exhaustive]


PROMISES = [
    pytest.param(form, check, id=f"{form}-{check}", marks=slow(form, check))
    for form in FORMS
    for check in CHECKS
    if check != "compiled_equals_eager" or form in PAIRS | COMPILED
]
EVERY_FORM = pytest.mark.parametrize(
    "form", [f if f in USUAL else pytest.param(f, marks=pytest.mark.exhaustive) for f in sorted(ONCE)]
)


@pytest.mark.parametrize(("form", "check"), PROMISES)
def test_promise(form: str, check: str):
    attention, score, options = FORMS[form]
    CHECKS[check](attention, score, **options)


SIZES = {"batch": st.integers(1, 3), "length": st.integers(2, 14), "seed": st.integers(0, 10**6)}


@EVERY_FORM
@settings(max_examples=4)
@given(at=st.integers(1, 13), **SIZES)
def test_causality_at_any_size(form: str, at: int, batch: int, length: int, seed: int):
    attention, score, options = FORMS[form]
    sizes = {"batch": batch, "length": length, "seed": seed}
    CHECKS["causality"](attention, score, at=min(at, length - 1), **sizes, **options)


@EVERY_FORM
@settings(max_examples=5)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6), **SIZES)
def test_any_chunking(form: str, chunks: list[int], batch: int, length: int, seed: int):
    attention, score, options = FORMS[form]
    sizes = {"batch": batch, "length": length, "seed": seed}
    CHECKS["cached_equals_full"](attention, score, chunks=chunks, **sizes, **options)


@EVERY_FORM
@settings(max_examples=5)
@given(padding=st.lists(st.integers(0, 13), min_size=3, max_size=3), **SIZES)
def test_any_left_padding(form: str, padding: list[int], batch: int, length: int, seed: int):
    attention, score, options = FORMS[form]
    sizes = {"batch": batch, "length": length, "seed": seed}
    padding = [min(amount, length - 1) for amount in padding[:batch]]
    CHECKS["left_padded_equals_unpadded"](attention, score, padding=padding, **sizes, **options)


@EVERY_FORM
@settings(max_examples=4)
@given(segments=st.lists(st.integers(1, 4), min_size=1, max_size=4), left=st.integers(0, 3), **SIZES)
def test_any_packing(form: str, segments: list[int], left: int, batch: int, length: int, seed: int):
    attention, score, options = FORMS[form]
    sizes = {"batch": batch, "length": length, "seed": seed}
    left = min(left, length - 1)
    CHECKS["packed_equals_separate"](attention, score, segments=segments, left=left, **sizes, **options)


# Forms with one fault each, and the promises that fault breaks.


class SeesTheFuture(SoftmaxScore):
    def forward(self, q, k, v, *, scale, **rest):
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale), {}


class ForgetsItsVotes(SelectiveScore):
    def forward(self, *qkv, state, **rest):
        return super().forward(*qkv, state={}, **rest)


class AttendsToPadding(SoftmaxScore):
    def forward(self, *qkv, key_mask, **rest):
        return super().forward(*qkv, key_mask=None, **rest)


class IgnoresSegments(SelectiveScore):
    def forward(self, *qkv, segment_ids, **rest):
        return super().forward(*qkv, segment_ids=None, **rest)


class NaNWithoutKeys(SoftmaxScore):
    def forward(self, *qkv, key_mask, **rest):
        out, state = super().forward(*qkv, key_mask=key_mask, **rest)
        if key_mask is not None:
            out = out / key_mask.any(-1)[:, None, None, None]
        return out, state


class AnswersPadding(SoftmaxScore):
    def forward(self, *qkv, key_mask, **rest):
        out, state = super().forward(*qkv, key_mask=key_mask, **rest)
        return (out if key_mask is None else out + ~key_mask[:, None, :, None]), state


class DetachesTheSelector(SelectiveScore):
    def forward(self, q, k, v, **rest):
        q = torch.cat((q[:, :1].detach(), q[:, 1:]), dim=1)
        return super().forward(q, k, v, **rest)


class MixesTheBatch(SoftmaxScore):
    def forward(self, q, k, v, **rest):
        return super().forward(q, k, v + v.mean(0, keepdim=True), **rest)


class BreaksTheGraph(SoftmaxScore):
    def forward(self, q, k, v, **rest):
        if v.sum() > 1e9:
            v = -v
        return super().forward(q, k, v, **rest)


class RoundsToBfloat16(SoftmaxScore):
    def forward(self, q, k, v, **rest):
        out, state = super().forward(q.bfloat16(), k.bfloat16(), v.bfloat16(), **rest)
        return out.to(v.dtype), state


class FailsInBfloat16(SoftmaxScore):
    def forward(self, q, k, v, **rest):
        return super().forward(q + 0.2 * (q.dtype == torch.bfloat16), k, v, **rest)


class LearnsNothing(SoftmaxScore):
    def __init__(self, *args):
        super().__init__(*args)
        self.unused = nn.Parameter(torch.zeros(3))


class HoldsABuffer(SoftmaxScore):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("steps", torch.zeros(()))


class UncountedState(SoftmaxScore):
    def forward(self, q, k, v, **rest):
        out, _ = super().forward(q, k, v, **rest)
        return out, {"norms": k.norm(dim=-1)}


class Miscounts(SoftmaxScore):
    @dataclass(frozen=True)
    class Config(ScoreConfig):
        def parameter_count(self, n_heads: int, d_model: int) -> int:
            return 7

        def flops_per_token(self, context: int, n_heads: int, qk_dim: int, v_dim: int, d_model: int) -> int:
            return context * n_heads * (qk_dim + v_dim)


class OverridesForwardAlone(SoftmaxScore):
    def forward(self, q, k, v, **rest):
        return super().forward(q / (1 + q.norm(dim=-1, keepdim=True)), k, v, **rest)


class SlotsAtAnotherScale(SelectiveScore):
    def attend_slots(self, q, *kv, **rest):
        return super().attend_slots(0.5 * q, *kv, **rest)


class SeesTheEvicted(SoftmaxScore):
    def attend_pruned(self, *qkv, evict, **rest):
        return super().attend_pruned(*qkv, evict=lambda rows: (evict(rows), None)[1], **rest)


class VotesTwice(SelectiveScore):
    def attend_slots(self, *qkv, state, **rest):
        out, slot = super().attend_slots(*qkv, state=state, **rest)
        state["soft_mask"] *= 2
        return out, slot


class SeesEmptySlots(SoftmaxScore):
    def attend(self, q, k, v, *, visible, **rest):
        if q.shape[2] == 1:
            visible = torch.ones_like(visible)
        return super().attend(q, k, v, visible=visible, **rest)


WITHOUT_COMPILING = {name: check for name, check in CHECKS.items() if name != "compiled_equals_eager"}


@pytest.fixture
def registries() -> Iterator[None]:
    """Forget what a test registers."""
    before = [(registry, dict(registry.forms)) for registry in (ATTENTIONS, SCORES)]
    yield
    for registry, forms in before:
        registry.forms.clear()
        registry.forms.update(forms)


BROKEN: list[tuple[type[Score], list[str]]] = [
    (SeesTheFuture, ["causality", "cached_equals_full"]),
    (ForgetsItsVotes, ["cached_equals_full", "left_padded_equals_unpadded"]),
    (AttendsToPadding, ["left_padded_equals_unpadded", "padding_content_is_ignored"]),
    (IgnoresSegments, ["packed_equals_separate"]),
    (NaNWithoutKeys, ["all_padding_is_finite"]),
    (AnswersPadding, ["padded_queries_get_zeros"]),
    (DetachesTheSelector, ["gradients_are_right"]),
    (MixesTheBatch, ["batch_order"]),
    (BreaksTheGraph, ["compiled_equals_eager"]),
    (RoundsToBfloat16, ["gradients_are_right"]),
    (FailsInBfloat16, ["bfloat16_is_close"]),
    (LearnsNothing, ["gradients_reach_everything"]),
    (HoldsABuffer, ["state_dict_is_stable"]),
    (UncountedState, ["cache_bytes_are_exact"]),
    (Miscounts, ["parameter_count_is_exact", "flops_are_exact"]),
    (OverridesForwardAlone, ["roomy_budget_changes_nothing"]),
    (SlotsAtAnotherScale, ["roomy_budget_changes_nothing", "evictions_are_stepwise"]),
    (SeesTheEvicted, ["evictions_are_stepwise"]),
    (VotesTwice, ["evictions_are_stepwise"]),
    (SeesEmptySlots, ["evictions_ignore_padding"]),
]
CASES = [(form, check) for form, checks in BROKEN for check in checks]


@pytest.mark.parametrize(("form", "check"), CASES, ids=[f"{form.__name__}-{check}" for form, check in CASES])
def test_broken_score_is_caught(form: type[Score], check: str, registries: None):
    register_score("broken")(form)
    # A gradient that is wrong is measured once more, entry by entry: few entries.
    smaller = {"d_model": 8, "n_heads": 2} if check == "gradients_are_right" else {}
    with pytest.raises(
        AssertionError, match=f"mha x broken breaks {check}: .* At batch=2, length=9, seed=0[:,] "
    ):
        CHECKS[check]("mha", "broken", **smaller)


class ForgetsTheCache(GroupedQueryAttention):
    def forward(self, x: Tensor, *, cache: LayerCache | None = None, **rest: Any) -> Tensor:
        return super().forward(x, **rest)


class PositionsRestart(GroupedQueryAttention):
    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return super().project(x, torch.arange(x.shape[1])[None])


class OneNumberTooMany(GroupedQueryAttention):
    @dataclass(frozen=True)
    class Config(ATTENTIONS["mha"].config_class):
        def parameter_count(self) -> int:
            return super().parameter_count() + 1


@pytest.mark.parametrize(
    ("form", "check"),
    [
        (ForgetsTheCache, "cached_equals_full"),
        (PositionsRestart, "cached_equals_full"),
        (PositionsRestart, "packed_equals_separate"),
        (OneNumberTooMany, "parameter_count_is_exact"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_broken_attention_is_caught(form: type[Attention], check: str, registries: None):
    config = form.Config if "Config" in vars(form) else type("Config", (ATTENTIONS["mha"].config_class,), {})
    register_attention("broken", config=config)(form)
    with pytest.raises(AssertionError, match=f"broken x softmax breaks {check}: "):
        CHECKS[check]("broken")


def test_check_form_reports_all_that_is_broken(registries: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("heedful.testing.CHECKS", WITHOUT_COMPILING)
    register_score("broken")(Miscounts)
    with pytest.raises(AssertionError) as raised:
        check_form("mha", "broken")
    message = str(raised.value)
    assert message.startswith(f"2 of {len(WITHOUT_COMPILING)} broken:")
    assert "parameter_count_is_exact: config.parameter_count() is the number of parameters." in message
    assert "expected 4112, got 4119" in message
    assert "flops_are_exact" in message


def test_the_parameters_of_a_score_are_counted(registries: None):
    register_score("temperature")(Temperature)
    config = Temperature.Config()
    assert [config.parameter_count(heads, 32) for heads in (4, 6, 4)] == [4, 6, 4]
    plain, counted = (
        configure("sas", d_model=32, n_heads=4),
        configure("sas", "temperature", d_model=32, n_heads=4),
    )
    assert counted.parameter_count() - plain.parameter_count() == counted.score_heads == 12
    assert SoftmaxScore.Config().parameter_count(4, 32) == 0
    CHECKS["parameter_count_is_exact"]("mha", "temperature")


def test_counting_draws_no_random_numbers(registries: None):
    register_score("temperature")(Temperature)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Temperature.Config(start=3.0).parameter_count(4, 32)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unregistered_score_is_not_counted():
    with pytest.raises(ValueError, match="ScoreConfig is not registered; use @register_score"):
        ScoreConfig().parameter_count(4, 32)


def test_check_form_takes_one_name(registries: None, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "heedful.testing.CHECKS",
        {"one": lambda attention, score, **options: asked.append((attention, score))},
    )
    register_score("temperature")(Temperature)
    check_form(score="temperature")
    assert asked == [(attention, "temperature") for attention in ("mha", "mqa", "sas", "mla")]
    asked.clear()
    check_form("mqa")
    assert asked == [("mqa", "softmax"), ("mqa", "selective"), ("mqa", "gated")]
    with pytest.raises(TypeError, match="check_form needs a name"):
        check_form()
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        check_form(score="temprature")


def test_a_score_alone_is_checked_on_several_attentions(registries: None, monkeypatch: pytest.MonkeyPatch):
    name = "roomy_budget_changes_nothing"
    monkeypatch.setattr("heedful.testing.CHECKS", {name: CHECKS[name]})
    register_score("broken")(OverridesForwardAlone)
    with pytest.raises(AssertionError, match=r"^4 of 4 broken:") as raised:
        check_form(score="broken")
    assert all(
        f"{attention} x broken breaks {name}" in str(raised.value)
        for attention in ("mha", "mqa", "sas", "mla")
    )


def test_a_score_that_never_evicts_is_not_asked(registries: None):
    class NeverEvicts(Score):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.broken_when_evicting = OverridesForwardAlone(*args)

        def forward(self, *qkv: Tensor, **rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return self.broken_when_evicting(*qkv, **rest)

    register_score("plain")(NeverEvicts)
    for check in ("roomy_budget_changes_nothing", "evictions_are_stepwise", "evictions_ignore_padding"):
        CHECKS[check]("mha", "plain")


def test_checks_leave_the_global_seed_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    CHECKS["shapes_and_finite"]("mha")
    assert torch.equal(torch.rand(3), expected)


# What a stranger writes: a form of attention and a score in a file of their own.


class SharedKeyValue(Attention):
    """One projection for keys and values."""

    @dataclass(frozen=True)
    class Config(AttentionConfig):
        """Keys are values."""

        gain: float = option(1.0, "times the values")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.size, bias=config.bias)
        self.kv_proj = nn.Linear(config.d_model, config.kv_heads * config.size, bias=config.bias)
        self.reset_parameters()

    def logit_projections(self) -> list[nn.Linear]:
        return [self.q_proj]

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q = self.split_heads(self.q_proj(x), self.config.n_heads)
        v = self.split_heads(self.kv_proj(x), self.config.kv_heads)
        keys = self.place_keys(v, positions)
        return self.place_queries(q, positions), {"k": keys, "v": v * self.config.gain}


class Temperature(Score):
    """A learned temperature per head."""

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        """Scaled by a learned temperature."""

        start: float = option(1.0, "the temperature at the start")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.temperature = nn.Parameter(torch.full((self.n_heads,), self.config.start))
        self.plain = SoftmaxScore(SoftmaxScore.Config(impl=self.config.impl), self.n_heads, self.d_model)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.plain(q * self.temperature[:, None, None], k, v, **rest)


@pytest.mark.parametrize(
    "checks", [WITHOUT_COMPILING, pytest.param(CHECKS, marks=pytest.mark.exhaustive)], ids=["eager", "all"]
)
@pytest.mark.parametrize(
    ("attention", "score", "options"),
    [
        pytest.param("shared_kv", "softmax", {"gain": 2.0}, id="attention"),
        pytest.param("shared_kv", "temperature", {"n_kv_heads": 2, "start": 0.5}, id="both"),
        pytest.param("sas", "temperature", {"cache": "compact"}, id="score"),
    ],
)
def test_a_strangers_form(
    attention: str,
    score: str,
    options: dict[str, Any],
    checks: dict[str, Any],
    registries: None,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("heedful.testing.CHECKS", checks)
    register_attention("shared_kv")(SharedKeyValue)
    register_score("temperature")(Temperature)
    check_form(attention, score, **options)


PADDED = [f"{attention}-softmax" for attention in available()["attention"]]
PADDED += [f"mha-{score}" for score in available()["score"] if score != "softmax"] + ["sas-selective"]


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("cached", [None, "all", "evicting"])
def test_whatever_padding_holds(name: str, cached: str | None):
    """NaN in padding gives what zeros give, forward and backward, and leaves nothing behind in a cache."""
    attention, score, options = FORMS[name]
    torch.manual_seed(0)
    layer = build(attention, score, d_model=32, n_heads=4, **options).double().eval()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = mask[1, 5:7] = mask[1, 9] = False
    plain = torch.randn(2, 12, 32, dtype=torch.float64).masked_fill(~mask[..., None], 0.0)

    def results(x: Tensor) -> list[Tensor]:
        if cached is None:
            x = x.clone().requires_grad_()
            out = layer(x, key_mask=mask)
            out[mask].square().sum().backward()
            assert x.grad is not None
            return [out, x.grad]
        cache = LayerCache() if cached == "all" else EvictingCache(5, "streaming")
        with torch.no_grad():
            return [
                layer(x[:, a:b], key_mask=mask[:, a:b], cache=cache)
                for a, b in ((0, 7), (7, 9), (9, 10), (10, 12))
            ]

    found = results(plain.masked_fill(~mask[..., None], float("nan")))
    for one, expected in zip(found, results(plain), strict=True):
        assert torch.equal(one, expected)
        assert one.isfinite().all()


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_no_tokens(name: str, impl: str, masked: bool):
    """They give no outputs, gradients of 0, and leave a cache as it was."""
    attention, score, options = FORMS[name]
    torch.manual_seed(0)
    layer = build(attention, score, d_model=32, n_heads=4, impl=impl, **options).double().eval()
    x = torch.randn(2, 5, 32, dtype=torch.float64)

    def read(start: int, end: int, cache: KVCache | None) -> Tensor:
        mask = torch.ones(2, end - start, dtype=torch.bool) if masked else None
        return layer(x[:, start:end].clone().requires_grad_(cache is None), key_mask=mask, cache=cache)

    out = read(3, 3, None)
    assert out.shape == (2, 0, 32)
    gradients = torch.autograd.grad(out.sum(), list(layer.parameters()), allow_unused=True)
    reached = {n for (n, _), g in zip(layer.named_parameters(), gradients, strict=True) if g is not None}
    assert {n for n, _ in layer.score.named_parameters(prefix="score")} | {"o_proj.weight"} <= reached
    assert not any(g.any() for g in gradients if g is not None)
    for kind in (LayerCache, partial(EvictingCache, 4, "streaming")):
        with torch.no_grad():
            plain, cache = kind(), kind()
            expected = [read(a, b, plain) for a, b in ((0, 3), (3, 4), (4, 5))]
            found = [read(a, b, cache) for a, b in ((0, 0), (0, 3), (3, 3), (3, 4), (4, 4), (4, 5))]
        assert all(none.shape == (2, 0, 32) for none in found[::2])
        assert all(torch.equal(one, same) for one, same in zip(found[1::2], expected, strict=True))

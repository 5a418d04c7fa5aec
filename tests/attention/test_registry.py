"""Names, options, and what is said about wrong ones."""

import dataclasses
import importlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from heedful.attention import (
    Attention,
    AttentionConfig,
    GroupedQueryAttention,
    SASAttention,
    Score,
    ScoreConfig,
    SoftmaxScore,
    available,
    build,
    configure,
    option,
    register_attention,
    register_score,
)
from heedful.attention.registry import ATTENTIONS, SCORES

SIZES = {"d_model": 32, "n_heads": 4}


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Forget what a test registers."""
    before = [(registry, dict(registry.forms)) for registry in (ATTENTIONS, SCORES)]
    yield
    for registry, forms in before:
        registry.forms.clear()
        registry.forms.update(forms)


def says(exception: type[Exception], *parts: str) -> Any:
    """`pytest.raises` for messages that hold all parts."""
    return pytest.raises(exception, match="".join(f"(?=(?s:.*){_escape(part)})" for part in parts))


def _escape(text: str) -> str:
    return "".join("\\" + c if not c.isalnum() and c not in " _'" else c for c in text)


def test_available():
    assert {"mha", "mqa", "gqa", "sas"} <= set(available()["attention"])
    assert {"softmax", "selective"} <= set(available()["score"])


@pytest.mark.parametrize("make", [configure, build])
def test_unknown_names_suggest(make: Any):
    with says(ValueError, "unknown attention 'sass'", "did you mean 'sas'?", "mha", "HEEDFUL_FORMS"):
        make("sass", **SIZES)
    with says(ValueError, "unknown score 'selektive'", "did you mean 'selective'?", "softmax"):
        make("sas", "selektive", **SIZES)
    with says(ValueError, "unknown attention 'qqqqqq'", "available: "):
        make("qqqqqq", **SIZES)
    with says(ValueError, "unknown score 'nope'"):
        AttentionConfig(**SIZES, score="nope")


@pytest.mark.parametrize("make", [configure, build])
def test_unknown_options_suggest(make: Any):
    with says(
        ValueError, "sas x softmax has no option 'sim_head'", "did you mean 'sim_heads'?", "kernel_size"
    ):
        make("sas", **SIZES, sim_head=8)
    with says(ValueError, "mha x selective has no option 'sim_heads'", "options: d_model, n_heads"):
        make("mha", "selective", **SIZES, sim_heads=8)
    with says(ValueError, "no option 'imple'", "did you mean 'impl'?"):
        make("mha", "selective", **SIZES, imple="reference")


def test_options_go_where_they_belong():
    config = configure("sas", "selective", **SIZES, kernel_size=1, impl="reference", bias=True)
    assert (config.kernel_size, config.bias, config.score_config.impl) == (1, True, "reference")
    module = build("sas", "selective", **SIZES, kernel_size=1, impl="reference", bias=True)
    assert isinstance(module, SASAttention)
    assert module.config == config
    assert SASAttention(config).config == config
    direct = SASAttention(32, 4, kernel_size=1, bias=True, score=config.score)
    assert direct.config == config
    assert {n: t.shape for n, t in direct.state_dict().items()} == {
        n: t.shape for n, t in module.state_dict().items()
    }


def test_defaults_are_resolved():
    config = configure("sas", d_model=48, n_heads=4)
    assert (config.head_dim, config.n_kv_heads, config.sim_heads, config.sim_head_dim) == (12, 4, 12, 18)
    assert configure("sas", d_model=40, n_heads=4).sim_head_dim == 16  # 1.5 * 10 = 15, made even
    assert configure("mqa", **SIZES).n_kv_heads == 1
    assert configure("mha", **SIZES, head_dim=16).head_dim == 16


@pytest.mark.parametrize("attention", available()["attention"])
@pytest.mark.parametrize("score", ["softmax", "selective"])
def test_configs_survive_replace_and_pickle(attention: str, score: str):
    options = {"n_kv_heads": 2} if attention == "gqa" else {}
    config = configure(attention, score, **SIZES, **options)
    assert dataclasses.replace(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.form == attention
    assert config.score_config.form == score
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3


def test_contradictions_are_refused():
    with says(ValueError, "attention 'mha' has 4 key/value heads by definition", "n_kv_heads=2", "'gqa'"):
        configure("mha", **SIZES, n_kv_heads=2)
    with says(ValueError, "attention 'mqa' has 1 key/value heads", "n_kv_heads=2"):
        configure("mqa", **SIZES, n_kv_heads=2)
    with says(ValueError, "attention 'gqa' needs n_kv_heads, a divisor of n_heads (4)", "'mha' has 4"):
        configure("gqa", **SIZES)
    assert configure("mha", **SIZES, n_kv_heads=4) == configure("mha", **SIZES)


SHARED_ERRORS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "d_model": ({"d_model": 30}, ["d_model must be a multiple of n_heads (4), got 30; use 28 or 32"]),
    "d_model type": ({"d_model": 32.0}, ["d_model must be a whole number >= 1, got 32.0"]),
    "n_heads": ({"n_heads": 0}, ["n_heads must be a whole number >= 1, got 0"]),
    "bool": ({"n_heads": True}, ["n_heads must be a whole number >= 1, got True"]),
    "head_dim": ({"head_dim": -8}, ["head_dim must be a whole number >= 1, got -8"]),
    "odd head_dim": ({"head_dim": 7, "sim_head_dim": 7}, ["even", "got 7", "use 6 or 8, or rope=False"]),
    "n_kv_heads": ({"n_kv_heads": 3}, ["n_heads must be a multiple of n_kv_heads (3), got 4; use 3 or 6"]),
    "norm": (
        {"qk_norm_position": "after"},
        ["qk_norm_position must be 'before_rope' or 'after_rope', got 'after'"],
    ),
    "init std": ({"init_logit_std": 0.0}, ["init_logit_std must be a number greater than 0, got 0.0"]),
    "impl": ({"impl": "fast"}, ["impl must be 'auto' or 'reference' or 'sdpa', got 'fast'"]),
}
SAS_ERRORS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "even kernel": ({"kernel_size": 4}, ["kernel_size must be odd, so that", "got 4; use 3 or 5"]),
    "no kernel": ({"kernel_size": 0}, ["kernel_size must be a whole number >= 1, got 0"]),
    "negative kernel": ({"kernel_size": -3}, ["kernel_size must be a whole number >= 1, got -3"]),
    "sim_heads": ({"sim_heads": 10}, ["sim_heads must be a multiple of n_heads (4), got 10; use 8 or 12"]),
    "few sim_heads": ({"sim_heads": 2}, ["sim_heads must be a multiple of n_heads (4), got 2; use 4"]),
    "no sim_heads": ({"sim_heads": 0}, ["sim_heads must be a whole number >= 1, got 0"]),
    "odd size": ({"sim_head_dim": 11}, ["even sim_head_dim, got 11; use 10 or 12, or rope=False"]),
    "odd start": ({"sim_head_dim": 9}, ["even sim_head_dim, got 9", "rope=False"]),
    "narrow": (
        {"sim_head_dim": 6, "init": "identity"},
        ["sim_head_dim must be at least head_dim (8) to start as an identity, got 6", "use 8 or more"],
    ),
    "init": ({"init": "zero"}, ["init must be 'published' or 'identity', got 'zero'"]),
    "cache": ({"cache": "small"}, ["cache must be 'expanded' or 'compact', got 'small'"]),
    "fraction": ({"sim_heads": 12.0}, ["sim_heads must be a whole number >= 1, got 12.0"]),
    "fractional kernel": ({"kernel_size": 3.0}, ["kernel_size must be a whole number >= 1, got 3.0"]),
}


@pytest.mark.parametrize("case", SHARED_ERRORS | SAS_ERRORS)
def test_errors(case: str):
    options, parts = (SHARED_ERRORS | SAS_ERRORS)[case]
    with says(ValueError, *parts):
        configure("sas", **{**SIZES, **options})


@pytest.mark.parametrize("attention", available()["attention"])
def test_qk_norm_is_the_forms_own_unless_told(attention: str):
    options = {**SIZES, "n_kv_heads": 2} if attention == "gqa" else SIZES
    without = attention in ("mla", "tpa")
    assert configure(attention, **options).qk_norm is not without
    assert configure(attention, **options, qk_norm=False).qk_norm is False
    if without:
        with says(
            ValueError, f"attention {attention!r} has no QK-norm: ", "leave qk_norm out, or give False"
        ):
            configure(attention, **options, qk_norm=True)
    else:
        assert configure(attention, **options, qk_norm=True) == configure(attention, **options)


def test_an_odd_size_is_fine_without_rope():
    assert build("sas", **SIZES, sim_head_dim=11, rope=False)(torch.randn(1, 3, 32)).shape == (1, 3, 32)


def test_a_config_leaves_no_room_for_more():
    config = configure("mha", **SIZES)
    with pytest.raises(TypeError, match="n_heads"):
        GroupedQueryAttention(config, n_heads=8)
    with pytest.raises(TypeError, match=r"SASAttention.*SASConfig.*MHAConfig"):
        SASAttention(config)


def test_a_name_is_taken_once():
    class Mine(Score):
        pass

    with says(
        ValueError, "score 'softmax' is already heedful.attention.softmax.SoftmaxScore; choose another name"
    ):
        register_score("softmax")(Mine)
    for name in ("my form", "1st", "a-b", ""):
        with says(ValueError, "attention name must be letters, digits and _", repr(name)):
            register_attention(name)
    assert register_score("softmax")(SoftmaxScore) is SoftmaxScore  # the same file, loaded again


def test_unregistered_forms_say_so():
    with says(ValueError, "AttentionConfig is not registered", "@register_attention(name)"):
        AttentionConfig(**SIZES).build()


def test_a_form_without_options_of_its_own():
    """It gets a config class of its own; nobody else's changes."""

    class Plain(SoftmaxScore):
        """Plain, once more."""

    class Bare(Score):
        def forward(self, q, k, v, **rest):
            return v.repeat_interleave(q.shape[1] // v.shape[1], 1)[:, :, -q.shape[2] :], {}

    class Host(GroupedQueryAttention):
        """A host."""

    class Empty(Attention):
        """Nothing in it."""

    register_score("plain")(Plain)
    register_score("bare")(Bare)
    register_attention("host")(Host)
    register_attention("empty")(Empty)
    assert (SoftmaxScore.Config.form, Plain.Config.form, Bare.Config.form) == ("softmax", "plain", "bare")
    assert (ScoreConfig.form, AttentionConfig.form) == (None, None)
    assert configure("mha", "softmax", **SIZES).score_config.form == "softmax"
    module = build("host", "bare", **SIZES, n_kv_heads=2)
    assert isinstance(module, Host)
    assert isinstance(module.score, Bare)
    assert module(torch.randn(1, 3, 32)).shape == (1, 3, 32)
    assert SCORES["plain"].summary == "Plain, once more."


def test_two_forms_with_options_of_their_own():
    """A config derived from the base or from another form's is the form's own, docstring and all."""

    class First(Score):
        """A first score, without options."""

    class Second(Score):
        """The module."""

        @dataclass(frozen=True)
        class Config(ScoreConfig):
            """The config."""

            power: float = option(2.0, "an exponent")
            kind: Literal["soft", "hard"] = option("soft", "soft or hard")

    class Third(GroupedQueryAttention):
        @dataclass(frozen=True)
        class Config(ATTENTIONS["gqa"].config_class):
            """Grouped, with a depth."""

            depth: int = option(3, "how deep")

    own = Second.Config, Third.Config
    register_score("first")(First)
    register_score("second")(Second)
    register_attention("third")(Third)
    assert (Second.Config, Third.Config) == own
    assert (Second.Config.form, Third.Config.form, ATTENTIONS["gqa"].config_class.form) == (
        "second",
        "third",
        "gqa",
    )
    assert SCORES["second"].summary == "The config."
    assert ATTENTIONS["third"].summary == "Grouped, with a depth."
    config = configure("third", "second", **SIZES, n_kv_heads=2, depth=5, power=0.5)
    assert (config.depth, config.score_config.power) == (5, 0.5)
    with says(ValueError, "kind must be 'soft' or 'hard', got 'firm'"):
        configure("third", "second", **SIZES, n_kv_heads=2, kind="firm")


def test_summaries():
    for registry in (ATTENTIONS, SCORES):
        for name in registry:
            summary = registry[name].summary
            assert summary.endswith("."), f"{name}: {summary!r}"
            assert len(summary) < 120


def test_a_form_without_a_config_of_its_own_can_be_pickled(tmp_path, monkeypatch):
    lines = [
        "from heedful.attention import GroupedQueryAttention, register_attention",
        '@register_attention("pickled_form")',
        "class PickledForm(GroupedQueryAttention):",
        "    pass",
    ]
    (tmp_path / "pickled_form.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("pickled_form")
    module = build("pickled_form", **SIZES, n_kv_heads=2)
    assert module.config.form == "pickled_form"
    assert pickle.loads(pickle.dumps(module)).config == module.config
    del ATTENTIONS.forms["pickled_form"]

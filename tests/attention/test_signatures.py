"""What `inspect.signature`, `help` and a wrong keyword show of classes that are built from a config."""

import inspect
import pydoc
from dataclasses import dataclass, fields
from typing import Any

import pytest

from heedful.attention import (
    Attention,
    AttentionConfig,
    GroupedQueryAttention,
    SASAttention,
    option,
    register_attention,
)
from heedful.attention.registry import ATTENTIONS
from heedful.decoder import Decoder, DecoderConfig


@pytest.mark.parametrize("form", [GroupedQueryAttention, SASAttention, Attention])
def test_the_signature_is_that_of_the_config(form: type[Attention]):
    shown = inspect.signature(form).parameters
    assert sorted(shown) == sorted(f.name for f in fields(form.Config))
    for f in fields(form.Config):
        assert shown[f.name].annotation == f.type
    assert shown["d_model"].default is inspect.Parameter.empty
    assert shown["rope_theta"].default == 10000.0
    assert shown["rope_theta"].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_signature_has_the_options_of_the_form():
    shown = inspect.signature(SASAttention).parameters
    assert shown["kernel_size"].default == 3
    assert "sim_heads" in shown
    assert "sim_heads" not in inspect.signature(GroupedQueryAttention).parameters


def test_a_module_keeps_the_signature_of_its_call():
    module = SASAttention(32, 4)
    assert list(inspect.signature(module.forward).parameters)[:3] == ["x", "positions", "key_mask"]
    assert "d_model" not in inspect.signature(module).parameters


def test_a_strangers_form_shows_its_options(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ATTENTIONS, "forms", dict(ATTENTIONS.forms))

    class Late(GroupedQueryAttention):
        """Its config is set when it is registered."""

        @dataclass(frozen=True)
        class Config(AttentionConfig):
            """One option."""

            gain: float = option(2.0, "times the values")

    register_attention("late")(Late)
    assert inspect.signature(Late).parameters["gain"].default == 2.0
    with pytest.raises(TypeError, match="Late has no argument 'gian'; did you mean 'gain'"):
        Late(32, 4, gian=1.0)


def test_a_constructor_of_its_own_shows_its_own():
    class Narrow(SASAttention):
        def __init__(self, d_model: int) -> None:
            super().__init__(d_model, 4)

    assert list(inspect.signature(Narrow).parameters) == ["d_model"]
    assert "sim_heads" in inspect.signature(SASAttention).parameters


def test_the_signature_of_the_decoder():
    shown = inspect.signature(Decoder).parameters
    assert sorted(shown) == sorted(["config", *(f.name for f in fields(DecoderConfig))])
    assert shown["vocab_size"].default is inspect.Parameter.empty
    assert shown["attention_options"].default == {}
    assert shown["attention"].default == "mha"


@pytest.mark.parametrize("form", [SASAttention, Decoder])
def test_help_shows_the_options(form: Any):
    title = pydoc.render_doc(form, renderer=pydoc.plaintext).split("Method resolution order")[0]
    assert "n_heads: int" in title
    assert "rope_theta: float = 10000.0" in title
    assert "*args" not in title.split("\n |  \n")[0]


def test_a_wrong_keyword_says_what_it_could_have_been():
    with pytest.raises(
        TypeError, match=r"SASAttention has no argument 'sim_head'; did you mean 'sim_heads'\? "
    ):
        SASAttention(32, 4, sim_head=8)
    with pytest.raises(TypeError, match=r"arguments: d_model, n_heads, .*kernel_size"):
        SASAttention(32, 4, zzz=8)
    with pytest.raises(TypeError, match=r"Decoder has no argument 'n_layer'; did you mean 'n_layers'\? "):
        Decoder(vocab_size=9, d_model=32, n_heads=4, n_layer=2)


def test_an_option_of_the_score_says_where_it_goes():
    with pytest.raises(TypeError, match=r"'memory_loss'.* score='selective'.* heedful\.build"):
        SASAttention(32, 4, score="selective", memory_loss=0.1)

"""`HeedfulConfig`: what it accepts, what it resolves to, what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from heedful import Decoder
from heedful.hf import HeedfulConfig, HeedfulForCausalLM
from heedful.hf.convert import decoder_names


def test_import_registers(make_config: Callable[..., HeedfulConfig]):
    config = AutoConfig.for_model("heedful", vocab_size=50, hidden_size=32)
    assert isinstance(config, HeedfulConfig)
    assert isinstance(AutoModelForCausalLM.from_config(make_config()), HeedfulForCausalLM)


def test_heedful_alone_is_light():
    code = (
        "import sys, heedful; heedful.Decoder; heedful.available(); assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("attention", ["mha", "mqa", "gqa", "sas", ["mha", "sas"]], ids=str)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_parameters_of_the_decoder(make_config: Callable[..., HeedfulConfig], attention: Any, tie: bool):
    config = make_config(attention, "selective", tie_word_embeddings=tie)
    model, plain = HeedfulForCausalLM(config), Decoder(config.to_decoder_config())
    ours, theirs = decoder_names(model.state_dict()), plain.state_dict()
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}
    plain.load_state_dict(ours)
    ids = torch.arange(8)[None]
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids))
    assert model.num_parameters() == config.to_decoder_config().parameter_count()


@pytest.mark.parametrize("attention", ["mha", "gqa", "sas"])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk-norm", "no-qk-norm"])
def test_starts_as_the_decoder_does(make_config: Callable[..., HeedfulConfig], attention: str, qk_norm: bool):
    """The same seed gives the same weights: no rule of the start is lost on the way to transformers."""
    config = make_config(attention, qk_norm=qk_norm, tie_word_embeddings=False)
    starts = []
    for make in (HeedfulForCausalLM, lambda c: Decoder(c.to_decoder_config())):
        torch.manual_seed(0)
        starts.append(decoder_names(make(config).state_dict()))
    for name, weight in starts[0].items():
        assert torch.equal(weight, starts[1][name]), name


@pytest.mark.parametrize("saved", [True, False, None], ids=str)
def test_a_saved_qk_norm_is_kept(
    make_config: Callable[..., HeedfulConfig], saved: bool | None, tmp_path: Path
):
    """Folders of earlier versions say true or false; None is what each layer's form does."""
    make_config(["mha", "sas"], qk_norm=saved).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("qk_norm") is saved
    loaded = HeedfulConfig.from_pretrained(tmp_path)
    assert loaded.qk_norm is saved
    resolved = [c.qk_norm for c in loaded.to_decoder_config().attention_configs()]
    assert resolved == [saved is not False] * 2


def test_forms_with_and_without_qk_norm_go_together(make_config: Callable[..., HeedfulConfig]):
    model = HeedfulForCausalLM(make_config(["mha", "mla"]))
    assert [layer.attention.config.qk_norm for layer in model.model.layers] == [True, False]
    with pytest.raises(ValueError, match="attention 'mla' has no QK-norm"):
        make_config(["mha", "mla"], qk_norm=True)


@pytest.mark.parametrize(("attention", "heads"), [("mha", 4), ("mqa", 1), ("sas", 4)])
@pytest.mark.parametrize("empty", [{}, None], ids=["empty", "none"])
def test_empty_options_work(attention: str, heads: int, empty: Any):
    config = HeedfulConfig(attention=attention, attention_options=empty, score_options=empty)
    assert config.num_key_value_heads is None
    assert {c.n_kv_heads for c in config.to_decoder_config().attention_configs()} == {heads}


def test_special_tokens_default_to_none():
    config = HeedfulConfig()
    assert config.bos_token_id is config.eos_token_id is config.pad_token_id is None


def test_intermediate_size_is_resolved():
    assert HeedfulConfig(hidden_size=64).intermediate_size == 176
    assert HeedfulConfig(hidden_size=64, intermediate_size=100).intermediate_size == 100


def test_every_field_reaches_the_decoder():
    """A field that the translation forgot would silently fall back to the decoder's default."""
    given: dict[str, Any] = {
        "vocab_size": 51,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "intermediate_size": 77,
        "block": "gpt",
        "max_position_embeddings": 99,
        "attention": "sas",
        "attention_options": {"sim_heads": 12},
        "score": "selective",
        "score_options": {"impl": "sdpa"},
        "positions": "learned",
        "rope_theta": 500.0,
        "qk_norm": False,
        "qk_norm_position": "after_rope",
        "rms_norm_eps": 1e-4,
        "attention_bias": True,
        "init_logit_std": 0.7,
        "tie_word_embeddings": False,
        "dropout": 0.3,
    }
    decoder = HeedfulConfig(**given).to_decoder_config()
    other_names = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "d_ff": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    }
    assert {other_names.get(name, name): value for name, value in vars(decoder).items()} == given


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "gqa": ({"attention": "gqa"}, "attention 'gqa' needs n_kv_heads, a divisor of n_heads"),
    "mha-groups": ({"num_key_value_heads": 2}, "attention 'mha' has 4 key/value heads by definition"),
    "mqa-groups": ({"attention": "mqa", "num_key_value_heads": 2}, "attention 'mqa' has 1 key/value heads"),
    "groups": (
        {"attention": "gqa", "num_key_value_heads": 3},
        r"n_heads must be a multiple of n_kv_heads \(3\)",
    ),
    "heads": ({"num_attention_heads": 5}, r"d_model must be a multiple of n_heads \(5\)"),
    "name": ({"attention": "sass"}, "unknown attention 'sass'; did you mean 'sas'?"),
    "score": ({"score": "selectiv"}, "unknown score 'selectiv'; did you mean 'selective'?"),
    "option": ({"attention": "sas", "attention_options": {"sim_head": 8}}, "did you mean 'sim_heads'?"),
    "foreign-option": ({"attention_options": {"sim_heads": 8}}, "'mha' has no option 'sim_heads'"),
    "layers": ({"attention": ["mha"]}, "attention must have one entry per layer"),
    "positions": ({"positions": "alibi"}, "positions must be"),
    "typo": ({"hiden_size": 32}, "HeedfulConfig has no field 'hiden_size'; did you mean 'hidden_size'?"),
    "typo-options": ({"attention_option": {}}, "did you mean 'attention_options'?"),
    "typo-kv": ({"num_key_values_heads": 2}, "did you mean 'num_key_value_heads'?"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_contradictions_raise(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        HeedfulConfig(**wrong)


def test_unknown_names_are_kept_as_everywhere_in_transformers():
    assert HeedfulConfig(my_note="x").my_note == "x"

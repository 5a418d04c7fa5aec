"""To disk and back, bit for bit, and what is said about damaged folders."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from heedful.hf import HeedfulForCausalLM
from heedful.hf.load import load_model, load_tokenizer

Make = Callable[..., HeedfulForCausalLM]
MODELS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa-learned-untied": {"attention": "gqa", "positions": "learned", "tie_word_embeddings": False},
    "sas-published": {"attention": "sas", "score": "selective"},
    "sas-identity": {
        "attention": "sas",
        "score": "selective",
        "attention_options": {"init": "identity", "sim_head_dim": 16, "cache": "compact"},
        "qk_norm_position": "after_rope",
        "init_logit_std": 0.3,
    },
    "lists": {
        "attention": ["mha", "sas"],
        "attention_options": [{}, {"sim_heads": 8}],
        "score": ["selective", "softmax"],
        "score_options": [{"impl": "sdpa"}, {}],
        "qk_norm": False,
        "attention_bias": True,
    },
}

RELOAD = """
import sys
from pathlib import Path
import torch
import heedful.hf
from transformers import AutoModelForCausalLM
for folder in sorted(p for p in Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = torch.load(folder / "expected.pt")
    assert sorted(before["state"]) == sorted(model.state_dict()), folder
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before["state"][name]), (folder, name)
    assert not model.training
    assert torch.equal(model(before["ids"]).logits, before["logits"]), folder
    assert model.config.to_decoder_config() == heedful.DecoderConfig(**before["config"]), folder
"""


def test_round_trip_in_a_fresh_process(make_config: Callable[..., Any], ids: Tensor, tmp_path: Path):
    """Every weight and every logit comes back bit for bit, and so does the config."""
    for name, fields in MODELS.items():
        torch.manual_seed(0)
        model = HeedfulForCausalLM(make_config(**fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))  # nothing is at its start any more
        model.save_pretrained(tmp_path / name)
        files = {p.name for p in (tmp_path / name).iterdir()}
        assert files == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "modeling_heedful.py",
            "README.md",
        }
        expected = {
            "state": model.state_dict(),
            "ids": ids,
            "logits": model(ids).logits.detach(),
            "config": vars(model.config.to_decoder_config()),
        }
        torch.save(expected, tmp_path / name / "expected.pt")
    done = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_config_file_is_plain(make_model: Make, tmp_path: Path):
    make_model("sas", "selective").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "heedful"
    assert saved["architectures"] == ["HeedfulForCausalLM"]
    assert (saved["attention"], saved["score"]) == ("sas", "selective")
    assert saved["intermediate_size"] == 96


def test_dtype_is_kept(make_model: Make, tmp_path: Path):
    make_model().bfloat16().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.fixture
def saved(make_model: Make, tmp_path: Path) -> Path:
    make_model("sas").float().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_load_model(saved: Path):
    model = load_model(saved)
    assert isinstance(model, HeedfulForCausalLM)
    assert not model.training


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_missing(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match="nowhere does not exist; expected the folder of a trained model"
    ):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no model \(no config\.json\)$"):
        load_model(tmp_path)
    (tmp_path / "train.json").touch()
    with pytest.raises(FileNotFoundError, match=r"has not finished: heedful train --resume --out"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer \(no tokenizer\.json\)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [0, 3, 100, 5000])
def test_truncated_weights(saved: Path, size: int):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"the model in .* cannot be read \(.*\); train or copy it again"
    ) as error:
        load_model(saved)
    one_line(error)


def test_no_weights(saved: Path):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the model in .* cannot be read") as error:
        load_model(saved)
    assert "model.safetensors" in one_line(error)


def test_weights_that_do_not_fit(saved: Path):
    weights = load_file(saved / "model.safetensors")
    name = "model.layers.0.attention.q_expand.conv1.weight"
    lost = {n: w for n, w in weights.items() if n != name}
    save_file(lost, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json: .*missing_keys.*q_expand") as error:
        load_model(saved)
    one_line(error)
    save_file({**weights, "extra": torch.zeros(1)}, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json: .*unexpected_keys.*extra"):
        load_model(saved)
    wide = {**weights, name: torch.zeros(1, 2, 3)}
    save_file(wide, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be read|do not fit") as error:
        load_model(saved)
    one_line(error)


@pytest.mark.parametrize("garbage", ["", "{", "not json", "[]", "3", "null", "\x00\xff"])
def test_garbage_config(saved: Path, garbage: str):
    (saved / "config.json").write_text(garbage)
    with pytest.raises(ValueError, match=r"the model in .* cannot be read|holds a None model") as error:
        load_model(saved)
    one_line(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "sass"}, "unknown attention 'sass'; did you mean 'sas'?"),
        ({"attention_options": {"sim_heads": 7}}, "sim_heads must be a multiple"),
        ({"hidden_size": 48}, "cannot be read|do not fit"),
        ({"hidden_size": "wide"}, "whole number|hidden_size"),
        ({"num_hidden_layers": 10**4}, "num_hidden_layers must be at most 1,024, got 10000"),
        ({"vocab_size": 10**7}, r"config\.json asks for [\d,]+ parameters, the weights are [\d,]+\)"),
        ({"num_hidden_layers": 3}, "do not fit its config.json: .*missing_keys"),
        ({"model_type": "gpt2"}, "holds a 'gpt2' model, expected a heedful one"),
    ],
    ids=str,
)
def test_changed_config(saved: Path, change: dict[str, Any], message: str):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message) as error:
        load_model(saved)
    one_line(error)


def sharded(folder: Path, names: dict[str, str] | None = None) -> Path:
    """The weights in a file that an index names, or names something else for."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {**dict.fromkeys(weights, "model-1.safetensors"), **(names or {})}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_an_index_of_weights(saved: Path):
    load_model(sharded(saved))


@pytest.mark.parametrize(
    "name", ["../model-1.safetensors", "/etc/passwd", "other.safetensors", "model.bin", "", ".."]
)
def test_an_index_that_names_another_file(saved: Path, name: str):
    """Never followed out of the folder, whatever is there."""
    sharded(saved, {"lm_head.weight": name})
    (saved.parent / "model-1.safetensors").write_bytes((saved / "model-1.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"cannot be read \(.*model\.safetensors\.index\.json names "
    ) as error:
        load_model(saved)
    assert name in one_line(error)


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\x00\xff"]
)
def test_a_damaged_index(saved: Path, damage: str):
    (sharded(saved) / "model.safetensors.index.json").write_text(damage)
    with pytest.raises(ValueError, match=r"cannot be read \(.*model\.safetensors\.index\.json ") as error:
        load_model(saved)
    one_line(error)


def test_pickled_weights_are_never_read(saved: Path):
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    message = r"holds pickled weights \(pytorch_model.bin\), which may run any code when they are read"
    with pytest.raises(ValueError, match=message) as error:
        load_model(saved)
    assert "weights_only" not in one_line(error)


def test_weights_that_a_config_names(saved: Path):
    config = json.loads((saved / "config.json").read_text())
    config["transformers_weights"] = "../../x.safetensors.index.json"
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json names weights of its own, '\.\./\.\./x"):
        load_model(saved)


def test_another_model(tmp_path: Path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'gpt2' model, expected a heedful one"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_an_empty_file_of_a_tokenizer(tmp_path: Path, name: str):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"the tokenizer in .* cannot be read \(.*/{name} is no JSON"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read \(") as error:
        load_tokenizer(tmp_path)
    one_line(error)

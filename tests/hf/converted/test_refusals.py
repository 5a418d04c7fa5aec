"""What cannot be converted, or would be wrong without a word: one clear line, and nothing written."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import heedful
from heedful.hf import HeedfulCache
from heedful.hf.converted.settings import Conversion
from heedful.hf.names import CACHE


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**value, **changes}))


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def long_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04" + b"x" * 100)


def index_to(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        index = {"weight_map": {"model.embed_tokens.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove_config, "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
    "deeply nested JSON": (lambda f: (f / "config.json").write_text("[" * 10**6), "is no JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[1]"), "must hold an object, got list"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "pickled weights": (pickled, "holds pickled weights"),
    "truncated weights": (truncated, "is damaged or no safetensors file"),
    "a header without end": (long_header, "its header would take"),
    "other weights": (not_safetensors, "is damaged or no safetensors file"),
    "path traversal": (index_to("../part.safetensors"), "expected plain names of .safetensors files"),
    "absolute path": (index_to("/etc/passwd"), "expected plain names of .safetensors files"),
    "a file that is not there": (index_to("other.safetensors"), "which is not in the folder"),
    "no model type": (lambda f: edit(f, model_type=None), "has no model_type"),
    "another architecture": (
        lambda f: edit(f, model_type="mamba"),
        "cannot be converted: it has no attention",
    ),
    "latent attention": (lambda f: edit(f, model_type="deepseek_v3"), "latent attention (MLA)"),
    "an unknown architecture": (
        lambda f: edit(f, model_type="nonesuch"),
        "is not known here; known are llama",
    ),
    "quantized": (lambda f: edit(f, quantization_config={"bits": 4}), "is quantized; convert the checkpoint"),
    "too many layers": (lambda f: edit(f, num_hidden_layers=10**9), "says 1000000000 layers"),
    "no layers": (lambda f: edit(f, num_hidden_layers=0), "says 0 layers"),
    "huge shapes": (lambda f: edit(f, intermediate_size=10**12), "but config.json asks for"),
    "one layer more": (lambda f: edit(f, num_hidden_layers=4), "lacks 13 of the 54 tensors"),
    "a nonsense size": (lambda f: edit(f, num_attention_heads="many"), "is unsound"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_converted(case: str, save_source: Callable[..., Path], tmp_path: Path):
    change, message = BROKEN[case]
    source = save_source("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    change(source)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        heedful.convert(source, tmp_path / "out")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("family", "part", "message"),
    [
        (
            "mixtral",
            "experts.2.w1.weight",
            r"lacks 3 of the \d+ tensors of its config: model.layers.0.block_sparse",
        ),
        (
            "qwen3_moe",
            "layers.1.mlp.experts.3.down_proj",
            "lacks 1 of the .*: model.layers.1.mlp.experts.3.down_proj",
        ),
        ("gpt_neox", "embed_out.weight", "lacks 1 of the .* embed_out.weight"),
    ],
)
def test_weights_that_transformers_renames_are_missed_too(
    family: str, part: str, message: str, save_source: Callable[..., Path], tmp_path: Path
):
    """Experts were found missing when the converted model was loaded."""
    source = save_source(family)
    path = source / "model.safetensors"
    weights = load_file(path)
    gone = [name for name in weights if part in name]
    save_file({name: value for name, value in weights.items() if name not in gone}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        heedful.convert(source, tmp_path / "out")
    save_file({**weights, gone[0]: weights[gone[0]][:1].clone()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {gone[0]} in model.safetensors has shape"):
        heedful.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_is_never_overwritten(save_source: Callable[..., Path], tmp_path: Path):
    source, out = save_source("llama"), tmp_path / "out"
    heedful.convert(source, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(FileExistsError, match="exists; name another folder, or give --force"):
        heedful.convert(source, out)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    heedful.convert(source, out, select_dim=7, force=True)
    assert json.loads((out / "config.json").read_text())["heedful"]["score_options"]["select_dim"] == 7
    with pytest.raises(ValueError, match="is the source itself"):
        heedful.convert(source, source, force=True)
    with pytest.raises(ValueError, match="is a heedful model already"):
        heedful.convert(out, tmp_path / "again")
    with pytest.raises(ValueError, match="is no converted model"):
        heedful.convert(source, tmp_path / "again", back=True)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds more than a model; it is not replaced"):
        heedful.convert(source, other, force=True)
    assert (other / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "gated"}, "score must be 'selective' or 'softmax'"),
        ({"score": "softmax", "eviction": 16}, "casts no votes to evict by; name another policy"),
        ({"per": "token"}, "per must be 'layer' or 'kv_head'"),
        ({"selector": "head", "per": "kv_head"}, "needs selector='retention'"),
        ({"select_dim": 0}, "select_dim must be a whole number >= 1"),
        ({"eviction": 1}, "budget must be a whole number >= 2"),
        ({"eviction": [4, 4]}, r"one entry per layer \(3\), got 2"),
    ],
)
def test_unsound_options(
    options: dict[str, Any], message: str, save_source: Callable[..., Path], tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        heedful.convert(save_source("llama"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_memory_loss_is_refused(save_source: Callable[..., Path], tmp_path: Path):
    """Nobody would compute it."""
    with pytest.raises(ValueError, match="memory_loss has no effect in a converted model"):
        Conversion("selective", {"memory_loss": 0.1})
    out = heedful.convert(save_source("llama"), tmp_path / "out")
    settings = json.loads((out / "config.json").read_text())["heedful"]
    edit(out, heedful={**settings, "score_options": {**settings["score_options"], "memory_loss": 0.1}})
    with pytest.raises(ValueError, match="memory_loss has no effect"):
        heedful.load(out)


@pytest.fixture
def model(make_source: Callable[..., Any]) -> Any:
    return heedful.patch(make_source("llama"), select_dim=4)


def test_another_attention_is_refused(model: Any, save_source: Callable[..., Path], tmp_path: Path):
    for name in ("sdpa", "eager", "flash_attention_2"):
        with pytest.raises(ValueError, match=f"'{name}' is not supported by a converted model"):
            model.set_attn_implementation(name)
        out = heedful.convert(save_source("llama"), tmp_path / name)
        with pytest.raises(ValueError, match="it would attend without selection"):
            AutoModelForCausalLM.from_pretrained(out, attn_implementation=name)


def test_foreign_caches_are_refused(model: Any, ids: Tensor):
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=64)):
        with pytest.raises(TypeError, match="HeedfulCache"):
            model(ids, **{CACHE: cache})
        with pytest.raises(TypeError, match="HeedfulCache"):
            model.generate(ids, max_new_tokens=2, **{CACHE: cache})
    with pytest.raises(ValueError, match="cache_implementation='static' is not supported"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(NotImplementedError, match="paged caches are not supported"):
        model.generate_batch([[1, 2]])


def test_our_cache_in_a_stock_model_is_refused(make_source: Callable[..., Any], model: Any, ids: Tensor):
    """It would attend to the new tokens alone."""
    for cache in (model.new_cache(), HeedfulCache(3)):
        with pytest.raises(TypeError, match="is filled by heedful's attention"), torch.no_grad():
            make_source("llama")(ids, **{CACHE: cache})


def test_the_attention_function_is_for_converted_models(make_source: Callable[..., Any], ids: Tensor):
    stock = make_source("llama")
    stock.set_attn_implementation("heedful")
    with pytest.raises(ValueError, match="is for converted models, this is a LlamaAttention"):
        stock(ids)


def test_masks_that_are_not_causal_are_refused(model: Any, ids: Tensor):
    everything = torch.ones(2, 1, 24, 24, dtype=torch.bool)
    with pytest.raises(ValueError, match="attends causally, to real tokens of a document"):
        model(ids, attention_mask=everything)
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(ids, output_attentions=True)


def test_dropout_is_switched_off_or_refused(make_source: Callable[..., Any], ids: Tensor):
    model = heedful.patch(make_source("gpt2", attn_pdrop=0.3), select_dim=4).train()
    model(ids, labels=ids).loss.backward()
    for module in model.modules():
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.3
    with pytest.raises(ValueError, match=r"attention dropout \(0.3\) is not supported"):
        model(ids)


def test_a_packed_row_is_its_documents(model: Any, make_source: Callable[..., Any], ids: Tensor):
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    with torch.no_grad():
        packed = model(ids[:1], position_ids=positions).logits
        stock = make_source("llama")(ids[:1], position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, stock, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed[:, 10:], model(ids[:1, 10:]).logits, rtol=1e-4, atol=1e-4)


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "heedful" or name.startswith("heedful."):
            raise ModuleNotFoundError("No module named 'heedful'", name="heedful")
sys.meta_path.insert(0, Missing())
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "trusted")
except Exception as error:
    print(type(error).__name__, str(error).replace(chr(10), " "))
"""
ELSEWHERE = """
import sys
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""


def run(source: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(arguments[0]) + "-modules"},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_without_heedful_loading_says_what_to_do(save_source: Callable[..., Path], tmp_path: Path):
    out = heedful.convert(save_source("llama"), tmp_path / "out")
    assert 'pip install "heedful[lm]"' in run(WITHOUT, out, "trusted")
    assert "heedful_llama" in run(WITHOUT, out, "not") or "trust_remote_code" in run(WITHOUT, out, "not")
    assert run(ELSEWHERE, out) == "HeedfulLlamaForCausalLM"

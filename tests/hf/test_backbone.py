"""`HeedfulModel` and what stands on it: Auto classes, old names, packed documents, folders that load anywhere."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from heedful import Decoder
from heedful.hf import (
    HeedfulForCausalLM,
    HeedfulForSequenceClassification,
    HeedfulModel,
    from_decoder,
    to_decoder,
)
from heedful.hf.convert import decoder_names

Make = Callable[..., HeedfulForCausalLM]


def test_last_hidden_state_and_cache(make_model: Make, ids: Tensor):
    model = make_model("sas", "selective")
    whole = model.model(ids, output_hidden_states=True)
    torch.testing.assert_close(model.lm_head(whole.last_hidden_state), model(ids).logits)
    assert torch.equal(whole.hidden_states[-1], whole.last_hidden_state)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.model(inputs_embeds=embeds).last_hidden_state, whole.last_hidden_state)
    with torch.no_grad():
        first = model.model(ids[:, :6])
        rest = model.model(ids[:, 6:], past_key_values=first.past_key_values)
        same = model.model(ids[:, :6])
        other_name = model.model(ids[:, 6:], cache=same.past_key_values)
    torch.testing.assert_close(rest.last_hidden_state, whole.last_hidden_state[:, 6:])
    assert torch.equal(rest.last_hidden_state, other_name.last_hidden_state)


def test_the_head_calls_the_backbone(make_model: Make, ids: Tensor):
    """Hooks on it fire."""
    model, seen = make_model(), []
    model.model.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
    logits = model(ids).logits
    assert torch.equal(model.lm_head(seen[0]), logits)


def test_auto_classes_load_what_a_language_model_saved(make_model: Make, ids: Tensor, tmp_path: Path):
    model = make_model("mha", "selective").float()
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is HeedfulModel
    assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is HeedfulForSequenceClassification
    assert 0.3 < classifier.score.weight.std() * 32**0.5 < 2  # fresh, and not zero
    out = classifier(ids, labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3)
    torch.testing.assert_close(out.logits, classifier.score(model.model(ids).last_hidden_state[:, -1]))
    out.loss.backward()
    assert all(p.grad is not None for p in classifier.parameters())
    padded = torch.nn.functional.pad(ids[:1], (0, 3))
    mask = (padded != 0).long()
    torch.testing.assert_close(classifier(padded, attention_mask=mask).logits, out.logits[:1])


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_weights_saved_under_the_old_names_load(make_model: Make, ids: Tensor, tmp_path: Path, tie: bool):
    model = make_model("sas", "selective", tie_word_embeddings=tie, positions="learned").float()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    old = decoder_names(saved)
    assert "layers.0.attention.q_proj.weight" in old
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    fresh = HeedfulForCausalLM(model.config).eval()
    fresh.load_state_dict(decoder_names(model.state_dict()))
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_to_the_decoder_and_back(make_model: Make, ids: Tensor):
    model = make_model(["mha", "sas"], "selective", tie_word_embeddings=False)
    decoder = to_decoder(model)
    assert type(decoder) is Decoder and not decoder.training
    assert torch.equal(decoder(ids), model(ids).logits)
    back = from_decoder(decoder)
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert back.config.to_decoder_config() == model.config.to_decoder_config()


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_every_way_to_mark_packed_documents(make_model: Make, ids: Tensor, grad: bool):
    model, row = make_model("mha", "selective"), ids[:1]
    apart = torch.cat((model(row[:, :4]).logits, model(row[:, 4:]).logits), 1)
    ends = torch.tensor([0, 4, 10], dtype=torch.int32)
    segments = torch.tensor([[0] * 4 + [1] * 6])
    ways = {
        "positions": {"position_ids": torch.tensor([[*range(4), *range(6)]])},
        "lengths": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6},
        "segments": {"segment_ids": segments},
        "indices": {"seq_idx": segments},
    }
    with torch.set_grad_enabled(grad):
        for name, marks in ways.items():
            torch.testing.assert_close(model(row, **marks).logits, apart, msg=name)
    with pytest.raises(ValueError, match="describes one row of packed documents, got 2 rows"):
        model(ids, cu_seq_lens_q=ends)
    with pytest.raises(ValueError, match="must rise from 0 to the 10 tokens"):
        model(row, cu_seq_lens_q=ends[:2])
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k must be equal"):
        model(row, cu_seq_lens_q=ends, cu_seq_lens_k=ends + 1)


def test_a_saved_folder_loads_without_importing_heedful_first(make_model: Make, ids: Tensor, tmp_path: Path):
    model = make_model("sas", "selective").float()
    model.save_pretrained(tmp_path / "model")
    torch.save((ids, model(ids).logits.detach()), tmp_path / "expected.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.startswith("heedful") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model", trust_remote_code=True)
ids, logits = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(model(ids).logits, logits)
model.save_pretrained(sys.argv[1] + "/again")
"""
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [{p.name for p in (tmp_path / name).iterdir()} for name in ("model", "again")]
    assert files[0] == files[1] and "modeling_heedful.py" in files[0]
    assert "attention sas, score selective" in (tmp_path / "model/README.md").read_text()


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "sdpa", "flex_attention", "kernels-community/flash-attn2"]
)
def test_a_foreign_attention_is_refused(make_model: Make, tmp_path: Path, name: str):
    model = make_model().float()
    model.save_pretrained(tmp_path)
    message = f"attn_implementation='{name}' is not supported: heedful computes its own attention"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(model.config, attn_implementation=name)
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(name)
    model.set_attn_implementation("eager")
    assert AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").device == model.device

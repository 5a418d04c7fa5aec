"""transformers' text-generation pipeline on the folder of a trained run: batches say what single prompts say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, pipeline

from heedful.data.tokenizer import byte_tokenizer
from heedful.hf import HeedfulForCausalLM
from heedful.training.settings import TrainSettings

PROMPTS = ["Emma", "It is a truth universally acknowledged", "No one who", "x"]


@pytest.fixture(params=["softmax", "selective"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Model and tokenizer as a run leaves them; logits are far apart, so that rounding picks no token."""
    tokenizer = byte_tokenizer()
    settings = TrainSettings(d_model=32, n_layers=2, n_heads=4, score=request.param, init_logit_std=1.0)
    torch.manual_seed(0)
    model = HeedfulForCausalLM(settings.to_config(len(tokenizer), 64, tokenizer.bos_token_id))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0) if weight.ndim == 2 else None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_pad_tokens_are_saved(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] == generation.pad_token_id == tokenizer.pad_token_id == 256
    assert generation.eos_token_id == generation.bos_token_id == 256
    assert tokenizer.padding_side == "left"
    batch = tokenizer(["ab", "abcd"], padding=True)
    assert batch["input_ids"][0] == [256, 256, 97, 98]
    assert batch["attention_mask"][0] == [0, 0, 1, 1]


def test_a_batch_says_what_single_prompts_say(folder: Path):
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True, dtype=torch.float64)
    assert type(pipe.model).__name__ == "HeedfulForCausalLM"
    greedy = {"max_new_tokens": 12, "do_sample": False}
    alone = [pipe(prompt, **greedy)[0]["generated_text"] for prompt in PROMPTS]
    assert len({text[len(prompt) :] for text, prompt in zip(alone, PROMPTS, strict=True)}) > 1
    together = [out[0]["generated_text"] for out in pipe(PROMPTS, batch_size=2, **greedy)]
    assert together == alone


@pytest.mark.parametrize(
    "folder", [pytest.param("softmax", marks=pytest.mark.slow), "selective"], indirect=True
)
def test_a_pipeline_without_importing_heedful(folder: Path):
    code = """
import sys
from transformers import pipeline
assert not any(name.startswith("heedful") for name in sys.modules)
pipe = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
text = pipe("Emma", max_new_tokens=4, do_sample=False)[0]["generated_text"]
assert text.startswith("Emma") and len(text) > 4, text
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

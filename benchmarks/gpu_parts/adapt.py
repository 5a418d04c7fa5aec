"""A checkpoint of 1B parameters, of random weights, is converted and adapted: both stages, some steps each.

What it shows is that the commands run on a GPU, how fast, and in how much memory. With a real checkpoint it is:

    heedful convert Llama-3.2-1B out
    heedful adapt out --data my.txt --lora 16 --trainer.gradient-checkpointing true
"""

import json
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import heedful
from gpu_parts.common import Run

LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
STEPS = {"local": 20, "distill": 8}
NEEDED = "transformers", "accelerate", "tokenizers"


def main(run: Run) -> None:
    add = run.rows("adapt.jsonl")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        add({"skipped": f"not installed here: {', '.join(missing)}"})
        return
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(Path(folder) / "source", run)
        out = heedful.convert(source, Path(folder) / "out")
        context = 128 if run.tiny else 2048
        lora = find_spec("peft") is not None
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        result = heedful.adapt(
            out,
            data="austen",
            context=context,
            local_tokens=STEPS["local"] * context,
            lora=16 if lora else 0,
            distill_tokens=STEPS["distill"] * context,
            checkpoints=1,
            trainer={"gradient_checkpointing": True} if lora else {},
        )
        row: dict[str, Any] = {
            "parameters": "tiny" if run.tiny else "1B",
            "context": context,
            "held": result.held,
            "seconds": time.monotonic() - started,
            "kl_before": result.kl_before,
            "kl": result.kl,
            "peak_bytes": torch.cuda.max_memory_allocated() if run.device == "cuda" else None,
        }
        for stage in STEPS:
            row[f"{stage}_tokens_per_second"] = tokens_per_second(
                out / "adapt" / f"{stage}-log.jsonl", context
            )
        if not (0 <= result.kl < float("inf")):
            raise SystemExit(f"the KL to the source is {result.kl}")
        add(row)


def make_source(folder: Path, run: Run) -> Path:
    """A llama of random weights, with a tokenizer of bytes, as a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from heedful.data import byte_tokenizer

    torch.manual_seed(0)
    sizes = TINY if run.tiny else LLAMA_1B
    config = LlamaConfig(
        **sizes, max_position_embeddings=2048, initializer_range=0.05, tie_word_embeddings=True
    )
    with torch.device(run.device):
        model = LlamaForCausalLM(config).to(torch.float32 if run.tiny else torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tokens_per_second(log: Path, context: int) -> float | None:
    """Of a whole stage, measuring included; None if there was none."""
    if not log.exists():
        return None
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    ends = [entry for entry in entries if "train_runtime" in entry]
    return ends[-1]["step"] * context / ends[-1]["train_runtime"] if ends else None

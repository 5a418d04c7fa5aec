"""Two models of 30M parameters on the bytes of three novels, half a minute each: softmax, selection in Triton."""

import lzma
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import heedful
from gpu_parts.common import Run
from heedful.decoder import Decoder, DecoderConfig

FORMS: dict[str, dict[str, Any]] = {
    "mha softmax": {"score": "softmax"},
    "mha selective": {"score": "selective", "score_options": {"impl": "triton"}},
}
LEARNING_RATE, WARMUP = 6e-4, 50


def main(run: Run) -> None:
    add = run.rows("train.jsonl")
    text = Path(heedful.__file__).with_name("data") / "austen3.txt.xz"
    tokens = torch.frombuffer(bytearray(lzma.decompress(text.read_bytes())), dtype=torch.uint8).long()
    cut = len(tokens) * 9 // 10
    train, held_out = tokens[:cut].to(run.device), tokens[cut:].to(run.device)
    for form, options in FORMS.items():
        one_form(run, form, options, train, held_out, add)


def one_form(run: Run, form: str, options: dict[str, Any], train: Tensor, held_out: Tensor, add: Any) -> None:
    torch.manual_seed(0)
    width, layers, context, batch = (32, 1, 24, 1) if run.tiny else (512, 10, 1024, 16)
    heads = width // (16 if run.tiny else 64)
    config = DecoderConfig(
        vocab_size=256, d_model=width, n_layers=layers, n_heads=heads, max_positions=context, **options
    )
    model = Decoder(config).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(1)  # the same text for both
    seconds = 0.0 if run.tiny else (run.limit - 30) / 2  # what is left is for starting and measuring
    start, step = time.monotonic(), 0
    after_warmup: tuple[float, int] | None = None
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    while step < 2 or time.monotonic() - start < seconds:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        loss = next_token_loss(run, model, rows(train, batch, context, draw))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0 or step == 1:
            value = loss.item()  # waits, so that the clock means something
            if value != value:
                raise SystemExit(f"{form}: the loss is NaN at step {step}")
            after_warmup = after_warmup or (time.monotonic(), step)
            add({"form": form, "step": step, "seconds": time.monotonic() - start, "loss": value})
    run.wait()
    now = time.monotonic()
    speed = None
    if after_warmup is not None and step > after_warmup[1]:
        speed = (step - after_warmup[1]) * batch * context / (now - after_warmup[0])
    add(
        {
            "form": form,
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": step,
            "seconds": now - start,
            "tokens_per_second": speed,
            "validation_loss": validation_loss(run, model, held_out, context, 1 if run.tiny else batch),
            "peak_bytes": torch.cuda.max_memory_allocated() if run.device == "cuda" else None,
        }
    )


def rows(tokens: Tensor, batch: int, context: int, draw: torch.Generator) -> Tensor:
    """(batch, context + 1) at random places."""
    starts = torch.randint(len(tokens) - context - 1, (batch, 1), generator=draw)
    return tokens[(starts + torch.arange(context + 1)).to(tokens.device)]


def next_token_loss(run: Run, model: Decoder, ids: Tensor) -> Tensor:
    with torch.autocast(run.device, torch.bfloat16, enabled=run.device == "cuda"):
        logits = model(ids[:, :-1])
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def validation_loss(run: Run, model: Decoder, held_out: Tensor, context: int, batch: int) -> float:
    """Nats per byte, the same rows for every model."""
    model.eval()
    draw = torch.Generator().manual_seed(2)
    losses = [
        next_token_loss(run, model, rows(held_out, batch, context, draw)).item()
        for _ in range(1 if run.tiny else 8)
    ]
    return sum(losses) / len(losses)

"""A training step of models of 23M parameters, of each form, in turns; eager and compiled."""

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_parts.common import Run
from heedful.decoder import Decoder, DecoderConfig

FORMS: dict[str, dict[str, Any]] = {
    "mha": {},
    "selective": {"score": "selective"},
    "forgetting": {"score": "forgetting"},
    "mla": {"attention": "mla"},
    "tpa": {"attention": "tpa"},
    "sas_linear": {"attention": "sas_linear"},
    "sas": {"attention": "sas"},
    "sas x selective": {"attention": "sas", "score": "selective"},
}
COMPILED = ("mha", "sas")
ROUNDS, STEPS = 4, 3


def main(run: Run) -> None:
    add = run.rows("steps.jsonl")
    vocabulary, width, layers, context, batch = (64, 32, 1, 24, 2) if run.tiny else (8192, 512, 6, 1024, 32)
    models: dict[tuple[str, bool], Any] = {}
    for form, options in FORMS.items():
        for compiled in (False, True) if form in COMPILED and not run.tiny else (False,):
            torch.manual_seed(0)
            config = DecoderConfig(width, 8, vocab_size=vocabulary, n_layers=layers, **options)
            model: Any = Decoder(config).to(run.device).train()
            models[form, compiled] = torch.compile(model) if compiled else model
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-3) for name, model in models.items()}
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (batch, context + 1), generator=draw).to(run.device)
    segments = (torch.rand(batch, context, generator=draw) < 1 / 300).cumsum(1).to(run.device)
    seconds: dict[tuple[str, bool], list[float]] = {name: [] for name in models}
    for turn in range(2 if run.tiny else ROUNDS):
        for name in models:
            for at in range(STEPS):
                start = time.perf_counter()
                _step(run, models[name], optimizers[name], ids, segments)
                if turn or at == STEPS - 1:  # the first ones compile
                    seconds[name].append(time.perf_counter() - start)
    fastest = min(seconds["mha", False])
    for (form, compiled), found in seconds.items():
        row = {"form": form, "compiled": compiled, "seconds": min(found), "to_mha": min(found) / fastest}
        add(row | {"turns": found, "context": context, "batch": batch})


def _step(run: Run, model: Any, optimizer: Any, ids: Tensor, segments: Tensor) -> None:
    with torch.autocast(run.device, torch.bfloat16):
        logits = model(ids[:, :-1], segment_ids=segments)
    F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    run.wait()

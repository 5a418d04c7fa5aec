"""Retentions that learn through the network: the loss of a softened eviction, not each layer's own.

    python studies/conversion/end_to_end.py ADAPTED OUT --steps 40 a.txt b.txt ...
    heedful eval OUT --source stock --data persuasion.txt ...

Each layer keeps a key with probability sigmoid((theta - F) / tau), where theta is the F of the last key that a
budget has room for; its logarithm is added to the logits. The loss is the KL of the next token to the model with
every token, as in the second stage of `heedful adapt`; retentions alone are trained, three budgets in turn.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adaptation.learning import input_sizes, learning_layers
from heedful.evaluation.loss import divergence
from heedful.hf.load import load_model, load_tokenizer
from heedful.ops.dot_product import repeat_kv


class Softened:
    """What all layers share: how many keys stay, and how softly."""

    budget: int | None = None
    tau = 0.5

    def __init__(self, grace: int, first: int) -> None:
        self.grace, self.first = grace, first

    def log_kept(self, F: Tensor, budget: int) -> Tensor:
        """log of the probability to be kept, (B, R, T, T), from F before every query."""
        at = torch.arange(F.shape[-1])
        age = at[:, None] - at
        may_go = (age >= self.grace) & (at >= self.first)
        room = budget - self.grace - self.first
        ranked = F.detach().masked_fill(~may_go, torch.inf).sort(-1).values
        theta = ranked[..., room - 1 : room + 1].mean(-1, keepdim=True)  # inf where all have room
        kept = nn.functional.logsigmoid((theta - F) / self.tau)
        kept = kept.masked_fill(~may_go | theta.isinf(), 0.0)
        return kept.masked_fill(age < 0, -torch.inf)

    def forward(
        self, score: Any, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, scale: float, **rest: Any
    ) -> Any:
        """Instead of the score's own."""
        own = score.selection(x, scale)
        at = torch.arange(q.shape[2])
        votes = own.k[..., 0][:, :, None] * (at[:, None] - at).clamp(min=0)  # every later query casts as many
        if self.budget is None:
            bias = torch.zeros(q.shape[2], q.shape[2]).masked_fill(at > at[:, None], -torch.inf)[None, None]
        else:
            bias = self.log_kept(own.own_votes[:, :, None] + votes, self.budget)
        k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
        bias = bias.repeat_interleave(q.shape[1] // bias.shape[1], 1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return out, {}


def main() -> None:
    """Train, and save a converted model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--log", type=Path, default=Path(__file__).with_name("end-to-end.jsonl"))
    values = parser.parse_args()
    model, tokenizer, draw = load_model(values.model), load_tokenizer(values.model), random.Random(1)
    books = [Path(name).read_text(encoding="utf-8", errors="replace") for name in values.files]
    softened = Softened(grace=16, first=4)
    groups: list[dict[str, Any]] = []
    model.requires_grad_(False)

    def row(book: str) -> Tensor:
        at = draw.randrange(len(book) - 8 * values.context)
        return torch.tensor(tokenizer(book[at : at + 8 * values.context])["input_ids"][: values.context])[
            None
        ]

    for layer, size in zip(learning_layers(model), input_sizes(model, row(books[0])), strict=True):
        first, _, last = layer.score.retain
        groups.append({"params": [first.weight], "lr": values.rate / size})
        groups.append({"params": [first.bias, *last.parameters()], "lr": values.rate})
        layer.score.retain.requires_grad_(True)
        layer.score.forward = MethodType(softened.forward, layer.score)
    optimizer, rates = torch.optim.Adam(groups), [group["lr"] for group in groups]
    for step in range(values.steps):
        started = time.perf_counter()
        fade = min(1.0, (step + 1) / 5) * (0.5 + 0.5 * math.cos(math.pi * step / values.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * fade
        ids = row(books[step % len(books)])
        softened.budget = None
        with torch.no_grad():
            taught = model(ids, use_cache=False).logits
        softened.budget = values.context // (4, 8, 2)[step % 3]
        loss = divergence(taught, model(ids, use_cache=False).logits) / ids.numel()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        said = {"step": step + 1, "budget": softened.budget, "kl": round(loss.item(), 4)}
        print(said, f"{time.perf_counter() - started:.0f} s", flush=True)
        with values.log.open("a") as file:
            file.write(json.dumps(said) + "\n")
    for layer in learning_layers(model):
        del layer.score.forward
    model.save_pretrained(values.out)
    tokenizer.save_pretrained(values.out)


if __name__ == "__main__":
    main()

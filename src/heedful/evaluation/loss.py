"""Validation loss of a causal language model, every labelled token counted once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from heedful.data import TokenDataset
from heedful.hf.cache import HeedfulCache


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`."""

    loss: float
    """Mean negative log-likelihood, nats per labelled token."""
    tokens: int
    """Labelled tokens."""
    accuracy: float
    """Share of labelled tokens whose most likely prediction is right."""

    def bits_per_byte(self, n_bytes: int) -> float:
        """Bits per byte of the text that the labelled tokens stand for; compares across tokenizers."""
        return self.loss * self.tokens / math.log(2) / n_bytes


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    rows: TokenDataset,
    *,
    batch_size: int = 32,
    kv_budget: int | Sequence[int] | str = "full",
    policy: str = "selective",
) -> Evaluation:
    """Measure `model` on `rows` in evaluation mode, as it predicts with a cache of `kv_budget` tokens.

    Args:
        model: a causal language model called as `model(input_ids=..., ...)`, giving `.logits`.
        rows: `input_ids` (N, T) and `labels` (N, T), -100 = not counted, shifted here; other tensors of
            the rows (such as `segment_ids`) are passed to the model.
        batch_size: rows at a time.
        kv_budget: tokens the cache of each layer holds while a query attends; a number, a list with one per
            layer, or "full". The evictions are replayed exactly, in one pass.
        policy: which token is evicted (`heedful.attention.eviction`).

    Returns:
        The mean over all labelled tokens, not over batches.

    Raises:
        ValueError: if no token is labelled, or for a budget with packed rows, an unsound budget or policy.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nll, right, tokens = 0.0, 0, 0
    try:
        for start in range(0, len(rows), batch_size):
            batch: dict[str, Any] = {
                k: v[start : start + batch_size].to(device) for k, v in rows.tensors.items()
            }
            labels = batch.pop("labels")[:, 1:]
            labelled = labels != -100
            if kv_budget == "full":
                batch["use_cache"] = False
            else:
                batch["past_key_values"] = HeedfulCache(len(model.layers), kv_budget, policy)  # type: ignore[arg-type]
            logits = model(**batch).logits[:, :-1][labelled].float()
            targets = labels[labelled]
            nll += F.cross_entropy(logits, targets, reduction="sum").double().item()
            right += int((logits.argmax(-1) == targets).sum())
            tokens += targets.numel()
    finally:
        model.train(was_training)
    if not tokens:
        raise ValueError("no token is labelled, so there is nothing to measure; check the labels")
    return Evaluation(nll / tokens, tokens, right / tokens)

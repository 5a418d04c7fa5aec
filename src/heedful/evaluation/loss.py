"""Validation loss of a causal language model, every labelled token counted once."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from heedful.attention.eviction import Eviction
from heedful.attention.eviction.settings import AnyBudget
from heedful.data import TokenDataset
from heedful.hf.cache import HeedfulCache
from heedful.ops.precision import wide_dtype

_TOGETHER = 512  # tokens whose log-probabilities are in memory at once


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


def evaluate(
    model: torch.nn.Module,
    rows: TokenDataset,
    *,
    batch_size: int = 32,
    kv_budget: AnyBudget = "full",
    kv_policy: str | None = None,
) -> Evaluation:
    """Measure `model` on `rows` in evaluation mode, as it predicts with a cache of `kv_budget` tokens.

    Args:
        model: a causal language model called as `model(input_ids=..., ...)`, giving `.logits`.
        rows: `input_ids` (N, T) and `labels` (N, T), -100 = not counted, shifted here; other tensors of
            the rows (such as `segment_ids`) are passed to the model.
        batch_size: rows at a time.
        kv_budget: tokens the cache of each layer holds while a query attends; a number, a list with one per
            layer, "full", or an `Eviction`. The evictions are replayed exactly, in one pass.
        kv_policy: which token is evicted (`heedful.attention.eviction`); default "selective".

    Returns:
        The mean over all labelled tokens, not over batches.

    Raises:
        ValueError: if no token is labelled, or for a budget with packed rows, an unsound budget or policy.
    """
    tally, eviction = Tally(), Eviction.of(kv_budget, kv_policy)
    with measuring(model):
        for batch in batches(model, rows, batch_size):
            cache = None
            if eviction.evicts:
                cache = model.new_cache(eviction)  # type: ignore[operator]
            tally.add(*labelled_logits(model, batch, cache))
    return tally.evaluation()


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) of the predictions, nats, summed over all tokens.

    Some tokens at a time, and again in the pass backward, so that no third tensor of this size is in memory.

    Args:
        full: (..., V) logits.
        other: (..., V) logits; gradients reach these.

    Returns:
        A scalar, float32 or wider.
    """

    def of_some(p: Tensor, q: Tensor) -> Tensor:
        p, q = (x.to(wide_dtype(x)).log_softmax(-1) for x in (p, q))
        return F.kl_div(q, p, reduction="none", log_target=True).sum()

    pieces = zip(*(x.flatten(0, -2).split(_TOGETHER) for x in (full, other)), strict=True)
    return torch.stack([checkpoint(of_some, p, q, use_reentrant=False) for p, q in pieces]).sum()


@contextmanager
def measuring(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode and gradients off; afterwards as they were."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def batches(model: torch.nn.Module, rows: TokenDataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The rows in order, `batch_size` at a time, on the device of the model, cut after their last token."""
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        batch = {name: tensor[start : start + batch_size] for name, tensor in rows.tensors.items()}
        if "attention_mask" in batch:
            read = (batch["attention_mask"].bool() | (batch["labels"] != -100)).any(0).nonzero()
            length = int(read.max()) + 1 if len(read) else 1
            batch = {name: tensor[:, :length] for name, tensor in batch.items()}
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def labelled_logits(
    model: torch.nn.Module, batch: dict[str, Tensor], cache: HeedfulCache | None = None
) -> tuple[Tensor, Tensor]:
    """What the model predicts where a token is labelled.

    Args:
        model: a causal language model.
        batch: some rows, `labels` (B, T) among them, shifted here.
        cache: an empty one, which is filled; None runs without.

    Returns:
        logits (M, V) of the M labelled tokens, float32 or wider, and the tokens (M,).
    """
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if cache is None:
        inputs["use_cache"] = False
    else:
        inputs["past_key_values"] = cache
    labels = batch["labels"][:, 1:]
    labelled = labels != -100
    logits = model(**inputs).logits[:, :-1][labelled]
    return logits if logits.dtype == torch.float64 else logits.float(), labels[labelled]


@dataclass
class Tally:
    """Sums over labelled tokens, batch after batch."""

    nll: float = 0.0
    """Negative log-likelihood, nats."""
    right: int = 0
    """Tokens whose most likely prediction is right."""
    tokens: int = 0
    """Labelled tokens."""

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count what `labelled_logits` returned."""
        self.nll += F.cross_entropy(logits, targets, reduction="none").double().sum().item()
        self.right += int((logits.argmax(-1) == targets).sum())
        self.tokens += targets.numel()

    def evaluation(self) -> Evaluation:
        """The means.

        Raises:
            ValueError: if no token was labelled.
        """
        if not self.tokens:
            raise ValueError("no token is labelled, so there is nothing to measure; check the labels")
        return Evaluation(self.nll / self.tokens, self.tokens, self.right / self.tokens)

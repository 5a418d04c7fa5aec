"""A trained model under KV-cache budgets: what a small cache costs in loss, and saves in memory and time."""

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from heedful.attention.eviction import Eviction
from heedful.attention.eviction.settings import Budget
from heedful.data import TokenDataset
from heedful.evaluation.loss import Tally, batches, divergence, labelled_logits, measuring
from heedful.evaluation.search import check_policy
from heedful.hf.cache import HeedfulCache

BUDGETS: tuple[int | str, ...] = (8, 16, 32, 64, "full")
WARM_UP = 8


@dataclass(frozen=True)
class BudgetResult:
    """One policy with one budget, on all rows."""

    policy: str | None
    """Which token is evicted; None for the full cache, where none is."""
    kv_budget: Budget
    """As it was asked for."""
    kept: float
    """Most tokens that a layer held at the end of a row, the mean over the layers."""
    tokens: int
    """Labelled tokens."""
    loss: float
    """Nats per labelled token."""
    bits_per_byte: float | None
    """Of the text that the labelled tokens stand for; None where its bytes are not known."""
    accuracy: float
    """Share of labelled tokens whose most likely prediction is right."""
    kl: float
    """KL(full cache || budget) of the predictions, nats per labelled token; the full cache is that of the source,
    where one is given."""
    agreement: float
    """Share of labelled tokens whose most likely prediction is that of the full cache."""
    cache_bytes: int
    """Bytes of the cache for one row: with a budget all slots, filled or not, and what the policy remembers;
    for the full cache those of the tokens held."""
    tokens_per_second: float
    """Decoding one row token by token: the reciprocal of the median time of a token."""


def evaluate_budgets(
    model: Any,
    rows: TokenDataset,
    budgets: Sequence[Budget] = BUDGETS,
    policies: Sequence[str] | None = None,
    *,
    grace: int = 1,
    first: int = 1,
    source: Any = None,
    n_bytes: int | None = None,
    batch_size: int = 32,
    decoded: int = 128,
    progress: Callable[[str | None, Budget, int], None] | None = None,
) -> Iterator[BudgetResult]:
    """Measure `model` on `rows` with every policy and budget, one after the other.

    Every budget is compared with the full cache batch by batch: the logits of two batches are in memory, never
    those of all rows.

    Args:
        model: a `HeedfulForCausalLM`, or a converted model.
        rows: `input_ids` (N, T), `labels` (N, T) with -100 = not counted, shifted here, and `attention_mask`
            (N, T) where rows are padded. One text per row (`heedful.data.by_document`).
        budgets: tokens held per layer: numbers, lists with one per layer, or "full", which is measured once.
            A budget of a whole row or more evicts nothing.
        policies: which token is evicted (`heedful.attention.eviction`); default: `default_policies(model)`.
        grace: the newest tokens that never go, the one that has just arrived included.
        first: the first tokens that never go.
        source: the model that `model` was made from (`load_source`): its full cache is what predictions are
            compared with, and it runs under policies other than "selective", which need no training, unless
            `model` does not select: then what was done to it was done for them. None: `model`.
        n_bytes: UTF-8 bytes that the labelled tokens stand for, for bits per byte.
        batch_size: rows at a time.
        decoded: tokens decoded one by one to measure the speed, at most; the first few do not count.
        progress: called with policy, budget and a number of rows: 0 when it begins, then those of each batch.

    Returns:
        An iterator that measures as it goes: the full cache first, then policy by policy, budgets in order.

    Raises:
        ValueError: at once, for no budget or policy, one named twice, a budget below 2, an unknown policy or one
            that needs a selective model, or packed rows; while measuring, if no token is labelled.
    """
    policies = default_policies(model) if policies is None else tuple(policies)
    check_policies(model, policies)
    if source is not None:
        check_policies(source, [name for name in policies if name != "selective"] or ["streaming"])
        if source.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"the source has a vocabulary of {source.config.vocab_size:,}, the model of "
                f"{model.config.vocab_size:,}: it was not made from that"
            )
    check_budgets(budgets, model.config.num_hidden_layers, grace, first)
    if "segment_ids" in rows.tensors:
        raise ValueError(
            "expected one text per row, got packed rows (segment_ids), which a cache that evicts cannot hold; "
            "make the rows with heedful.data.by_document"
        )
    if batch_size < 1 or decoded < 2:
        raise ValueError(
            f"batch_size must be 1 or more and decoded 2 or more, got {batch_size} and {decoded}"
        )
    plan: list[tuple[str | None, Budget]] = [(None, "full")] if "full" in budgets else []
    plan += [(policy, budget) for policy in policies for budget in budgets if budget != "full"]
    report = progress or (lambda policy, budget, n_rows: None)
    evictions = [
        (p, b, Eviction() if p is None else Eviction.of(b, p, kv_grace=grace, kv_first=first))
        for p, b in plan
    ]
    full = model if source is None else source
    selects = "selective" in default_policies(model)
    return (
        _measure(
            model if p in (None, "selective") or not selects else full,
            full,
            rows,
            p,
            b,
            e,
            n_bytes,
            batch_size,
            decoded,
            report,
        )
        for p, b, e in evictions
    )


def default_policies(model: Any) -> tuple[str, ...]:
    """The policies worth comparing in `model`: "selective" only where every layer selects."""
    try:
        check_policy(model, "selective")
    except ValueError:
        return ("streaming", "h2o")
    return ("selective", "streaming", "h2o")


def check_policies(model: Any, policies: Sequence[str]) -> None:
    """Raise ValueError unless all `policies` exist, differ, and go with `model`."""
    if not policies:
        raise ValueError("expected one policy or more, got none")
    _check_different("policy", policies)
    for name in policies:
        check_policy(model, name)


def check_budgets(budgets: Sequence[Budget], n_layers: int = 1, grace: int = 1, first: int = 1) -> None:
    """Raise ValueError unless all `budgets` are sound and differ."""
    if not budgets:
        raise ValueError("expected one budget or more, got none")
    evictions = [
        Eviction() if budget == "full" else Eviction.of(budget, kv_grace=grace, kv_first=first)
        for budget in budgets
    ]
    _check_different("budget", [tuple(eviction.budgets(n_layers)) for eviction in evictions], budgets)


def to_csv(results: Sequence[BudgetResult]) -> str:
    """A header and a line per result, raw; the budget of a list is its numbers with commas between."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["policy", "kv_budget", "kept", "tokens", "loss", "bits_per_byte", "accuracy"]
        + ["kl", "agreement", "cache_bytes", "tokens_per_second"]
    )
    for r in results:
        writer.writerow(
            [r.policy, budget_name(r.kv_budget), r.kept, r.tokens, r.loss, r.bits_per_byte, r.accuracy]
            + [r.kl, r.agreement, r.cache_bytes, round(r.tokens_per_second, 1)]
        )
    return text.getvalue()


def budget_name(budget: Budget) -> str:
    """`64`, `64,32` or `full`."""
    return str(budget) if isinstance(budget, int | str) else ",".join(map(str, budget))


def _measure(
    model: Any,
    full: Any,
    rows: TokenDataset,
    policy: str | None,
    budget: Budget,
    eviction: Eviction,
    n_bytes: int | None,
    batch_size: int,
    decoded: int,
    report: Callable[[str | None, Budget, int], None],
) -> BudgetResult:
    def new_cache() -> HeedfulCache:
        return model.new_cache(eviction)

    report(policy, budget, 0)
    tally, apart, same, cache_bytes = Tally(), 0.0, 0, 0
    kept: list[int] = []
    with measuring(model), measuring(full):
        for batch in batches(model, rows, batch_size):
            n_rows, cache = len(batch["labels"]), new_cache()
            logits, targets = labelled_logits(model, batch, cache)
            tally.add(logits, targets)
            if policy is not None or full is not model:
                taught = labelled_logits(full, batch)[0]
                apart += float(divergence(taught, logits))
                same += int((taught.argmax(-1) == logits.argmax(-1)).sum())
            else:
                same += len(targets)
            cache_bytes = max(cache_bytes, held_bytes(cache) // n_rows)
            kept = [max(pair) for pair in zip(kept or cache.kept, cache.kept, strict=True)]
            report(policy, budget, n_rows)
        speed = _decoding_speed(model, _longest_row(rows)[:decoded], new_cache())
    result = tally.evaluation()
    return BudgetResult(
        policy=policy,
        kv_budget=budget,
        kept=mean(kept),
        tokens=result.tokens,
        loss=result.loss,
        bits_per_byte=result.bits_per_byte(n_bytes) if n_bytes else None,
        accuracy=result.accuracy,
        kl=max(0.0, apart / result.tokens),  # rounding can take a sum of nothing below 0
        agreement=same / result.tokens,
        cache_bytes=cache_bytes,
        tokens_per_second=speed,
    )


def held_bytes(cache: HeedfulCache) -> int:
    """Bytes held: slots count whole; the room that a full cache has for tokens to come does not."""
    return sum(memory.used_bytes for memory in cache.memories)


def _longest_row(rows: TokenDataset) -> Tensor:
    """(T,) the tokens of the first row with the fewest padded."""
    ids, mask = rows.tensors["input_ids"], rows.tensors.get("attention_mask")
    if mask is None:
        return ids[0]
    row = int(mask.sum(-1).argmax())
    return ids[row][mask[row].bool()]


def _decoding_speed(model: Any, ids: Tensor, cache: HeedfulCache) -> float:
    """Tokens per second with the tokens (T,) of one row given one at a time."""
    device = next(model.parameters()).device
    seconds = []
    for token in ids.to(device).split(1):
        started = time.perf_counter()
        model(input_ids=token[None], past_key_values=cache)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 1 / median(seconds[min(WARM_UP, len(seconds) // 2) :])


def _check_different(what: str, values: Sequence[Any], given: Sequence[Any] | None = None) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            shown = value if given is None else budget_name(given[i])
            raise ValueError(f"the {what} {shown} is named twice; leave one out")

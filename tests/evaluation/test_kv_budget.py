"""Budgets are measured as decoding token by token would meet them, and compared with the full cache."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.attention.eviction import POLICIES
from heedful.data import TokenDataset
from heedful.evaluation import BudgetResult, evaluate, evaluate_budgets
from heedful.evaluation.kv_budget import default_policies, to_csv
from heedful.hf import HeedfulConfig, HeedfulForCausalLM
from heedful.hf.cache import HeedfulCache

VOCAB, LENGTH = 20, 17


def model_of(score: str = "selective", **changes: Any) -> HeedfulForCausalLM:
    """Two layers in float64, with logits that differ enough for evictions to matter."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "init_logit_std": 2.0,
    }
    return HeedfulForCausalLM(HeedfulConfig(score=score, **{**sizes, **changes})).double().eval()


@pytest.fixture(scope="module")
def model() -> HeedfulForCausalLM:
    return model_of()


@pytest.fixture(scope="module")
def rows() -> TokenDataset:
    """Seven rows of 3 to 17 tokens, padded on the right; not every token is labelled."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (7, LENGTH), generator=generator)
    lengths = torch.tensor([17, 3, 11, 17, 8, 14, 9])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    labels = ids.masked_fill(torch.rand((7, LENGTH), generator=generator) < 0.3, -100)
    return TokenDataset(
        {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    )


def one_by_one(
    model: HeedfulForCausalLM, rows: TokenDataset, budget: Any, policy: str
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M, V) of the labelled tokens, and the tokens, every row and token on its own."""
    found, targets = [], []
    tensors = rows.tensors
    masks = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"]))
    for ids, labels, mask in zip(tensors["input_ids"], tensors["labels"], masks, strict=True):
        cache = HeedfulCache(len(model.layers), budget, policy)
        for t in range(int(mask.sum()) - 1):
            with torch.no_grad():
                logits = model(ids[None, t : t + 1], past_key_values=cache).logits[0, 0]
            if labels[t + 1] != -100:
                found.append(logits.log_softmax(-1))
                targets.append(labels[t + 1])
    return torch.stack(found), torch.stack(targets)


def only(results: Any) -> BudgetResult:
    (result,) = results
    return result


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("budget", [3, [6, 4], 40], ids=str)
def test_as_decoding_one_token_after_another(
    model: HeedfulForCausalLM, rows: TokenDataset, policy: str, budget: int | list[int]
):
    ours, targets = one_by_one(model, rows, budget, policy)
    full, _ = one_by_one(model, rows, "full", policy)
    result = only(evaluate_budgets(model, rows, [budget], [policy], batch_size=3, decoded=2))
    assert (result.policy, result.kv_budget) == (policy, budget)
    assert result.tokens == len(targets)
    assert result.loss == pytest.approx(F.nll_loss(ours, targets).item(), rel=1e-12)
    assert result.accuracy == (ours.argmax(-1) == targets).double().mean().item()
    kl = (full.exp() * (full - ours)).sum(-1).mean().item()
    assert result.kl == pytest.approx(kl, rel=1e-9, abs=1e-12)
    assert (result.kl > 1e-4) == (budget != 40)  # 40 tokens are more than a row has
    assert result.kept == {3: 3, 40: LENGTH}.get(budget if isinstance(budget, int) else 0, 5)


def test_the_full_cache(model: HeedfulForCausalLM, rows: TokenDataset):
    ours, targets = one_by_one(model, rows, "full", "streaming")
    result = only(evaluate_budgets(model, rows, ["full"], decoded=2))
    assert (result.policy, result.kv_budget, result.kl, result.kept) == (None, "full", 0.0, LENGTH)
    assert result.loss == pytest.approx(F.nll_loss(ours, targets).item(), rel=1e-12)
    assert result.loss == pytest.approx(evaluate(model, rows).loss, rel=1e-12)
    more = only(evaluate_budgets(model, rows, [LENGTH], ["h2o"], decoded=2))
    assert (more.loss, more.kl) == (pytest.approx(result.loss, rel=1e-12), pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_batches_do_not_matter(model: HeedfulForCausalLM, rows: TokenDataset, batch_size: int):
    def figures(size: int) -> list[tuple[float, ...]]:
        results = evaluate_budgets(model, rows, [4, "full"], ["selective"], batch_size=size, decoded=2)
        return [(r.loss, r.accuracy, r.kl, r.tokens, r.kept) for r in results]

    for ours, others in zip(figures(batch_size), figures(3), strict=True):
        assert ours == pytest.approx(others, rel=1e-12)


def test_padding_is_as_if_it_were_not_there(model: HeedfulForCausalLM, rows: TokenDataset):
    wider = {
        "input_ids": F.pad(rows.tensors["input_ids"], (0, 5), value=3),
        "attention_mask": F.pad(rows.tensors["attention_mask"], (0, 5)),
        "labels": F.pad(rows.tensors["labels"], (0, 5), value=-100),
    }
    wider["input_ids"][wider["attention_mask"] == 0] = 7
    for ours, same in zip(
        evaluate_budgets(model, TokenDataset(wider), [4, "full"], decoded=2),
        evaluate_budgets(model, rows, [4, "full"], decoded=2),
        strict=True,
    ):
        assert (ours.loss, ours.kl) == pytest.approx((same.loss, same.kl), rel=1e-12)
        assert (ours.tokens, ours.kept, ours.cache_bytes) == (same.tokens, same.kept, same.cache_bytes)


def test_bytes_are_those_of_the_cache():
    model = model_of(attention="gqa", num_key_value_heads=1).float()
    ids = torch.randint(VOCAB, (4, LENGTH))
    rows = TokenDataset({"input_ids": ids, "labels": ids})
    full, *budgets = evaluate_budgets(model, rows, [4, [4, 6], "full"], ["selective", "h2o"], decoded=2)
    for result in budgets:
        cache = HeedfulCache(2, result.kv_budget, result.policy or "")
        with torch.no_grad():
            model(ids[:1], past_key_values=cache)
        assert result.cache_bytes == cache.nbytes
    # k, v of one head of 8 numbers, and the soft mask: without the room for tokens to come
    assert full.cache_bytes == 2 * LENGTH * (2 * 8 + 1) * 4


def test_bits_per_byte_where_the_bytes_are_known(model: HeedfulForCausalLM, rows: TokenDataset):
    result = only(evaluate_budgets(model, rows, [4], ["h2o"], n_bytes=100, decoded=2))
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / math.log(2) / 100)
    assert only(evaluate_budgets(model, rows, [4], ["h2o"], decoded=2)).bits_per_byte is None


def test_order_progress_and_csv(model: HeedfulForCausalLM, rows: TokenDataset):
    seen: list[Any] = []
    results = evaluate_budgets(
        model,
        rows,
        [[4, 5], "full", 8],
        ["h2o", "selective"],
        batch_size=4,
        decoded=2,
        progress=lambda *state: seen.append(state),
    )
    assert seen == []  # nothing is measured before it is asked for
    first = next(results)
    assert seen == [(None, "full", 0), (None, "full", 4), (None, "full", 3)]
    done = [first, *results]
    assert [(r.policy, r.kv_budget) for r in done] == [
        (None, "full"),
        ("h2o", [4, 5]),
        ("h2o", 8),
        ("selective", [4, 5]),
        ("selective", 8),
    ]
    assert all(r.tokens_per_second > 0 for r in done)
    table = list(csv.DictReader(io.StringIO(to_csv(done))))
    assert [(row["policy"], row["kv_budget"]) for row in table][:3] == [
        ("", "full"),
        ("h2o", "4,5"),
        ("h2o", "8"),
    ]
    assert [float(row["loss"]) for row in table] == [r.loss for r in done]
    assert {row["bits_per_byte"] for row in table} == {""}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(rows: TokenDataset, training: bool):
    model = model_of().train(training)
    for _ in evaluate_budgets(model, rows, [4, "full"], decoded=2):
        assert model.training == training
        assert torch.is_grad_enabled()


def test_default_policies(model: HeedfulForCausalLM, rows: TokenDataset):
    assert default_policies(model) == ("selective", "streaming", "h2o")
    plain = model_of("softmax", num_hidden_layers=1)
    assert default_policies(plain) == ("streaming", "h2o")
    done = list(evaluate_budgets(plain, rows, [4], decoded=2))
    assert [r.policy for r in done] == ["streaming", "h2o"]


WRONG: dict[str, tuple[Sequence[Any], Sequence[str], str]] = {
    "small": ([8, 1], ["h2o"], "budget must be a whole number >= 2 .* got 1"),
    "twice": ([8, 4, 8], ["h2o"], "the budget 8 is named twice"),
    "twice-as-a-list": ([8, [8, 8]], ["h2o"], "the budget 8,8 is named twice"),
    "layers": ([[8, 4, 2]], ["h2o"], r"one entry per layer \(2\), got 3"),
    "word": (["half"], ["h2o"], "kv_budget must be \"full\", a whole number or a list .* got 'half'"),
    "no-budget": ([], ["h2o"], "expected one budget or more, got none"),
    "policy": ([8], ["selektive"], "unknown eviction policy 'selektive'; did you mean 'selective'"),
    "policy-twice": ([8], ["h2o", "h2o"], "the policy h2o is named twice"),
    "no-policy": ([8], [], "expected one policy or more, got none"),
}


@pytest.mark.parametrize(("budgets", "policies", "said"), WRONG.values(), ids=WRONG.keys())
def test_refused_at_once(
    model: HeedfulForCausalLM, rows: TokenDataset, budgets: Any, policies: Any, said: str
):
    with pytest.raises(ValueError, match=said):
        evaluate_budgets(model, rows, budgets, policies)


def test_refused_for_the_model_or_the_rows(model: HeedfulForCausalLM, rows: TokenDataset):
    with pytest.raises(
        ValueError, match=r"needs a model with score 'selective' .* use another policy, e.g. 'streaming'"
    ):
        evaluate_budgets(model_of("softmax"), rows, [8], ["h2o", "selective"])
    packed = TokenDataset({**rows.tensors, "segment_ids": torch.zeros_like(rows.tensors["input_ids"])})
    with pytest.raises(ValueError, match="got packed rows"):
        evaluate_budgets(model, packed, [8])
    unlabelled = torch.full_like(rows.tensors["labels"], -100)
    with pytest.raises(ValueError, match="no token is labelled"):
        next(evaluate_budgets(model, TokenDataset({**rows.tensors, "labels": unlabelled}), [8]))

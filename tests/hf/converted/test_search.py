"""The search for a budget per layer on converted models: a pass that begins at a layer is the whole pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.hf.converted.conftest import SPECS, VOCAB
from tests.hf.converted.test_families import let_them_vote

import heedful
from heedful.attention.eviction import Eviction
from heedful.data import TokenDataset
from heedful.evaluation import evaluate
from heedful.evaluation.layerwise import layers_of
from heedful.evaluation.proof import prove_budget
from heedful.evaluation.search import BudgetedLoss, BudgetSearch

CONTEXT = 20


@pytest.fixture
def rows() -> TokenDataset:
    """Some end in padding."""
    ids = torch.randint(3, VOCAB, (4, CONTEXT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    tensors = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    return TokenDataset(tensors)


@pytest.mark.parametrize(
    "family",
    [f if f in ("llama", "gemma2", "gpt2") else pytest.param(f, marks=pytest.mark.slow) for f in SPECS],
)
def test_reused_inputs_give_the_loss_of_evaluate(
    family: str, make_source: Callable[..., Any], rows: TokenDataset
):
    model = heedful.patch(make_source(family), per="kv_head", select_dim=4)
    if family not in ("mixtral", "qwen3_moe"):  # PyTorch multiplies groups in float32 at most
        model = model.double()
    rounding = 1e-9 if model.dtype == torch.float64 else 1e-5
    let_them_vote(model)
    losses = BudgetedLoss(model, rows, batch_size=3, grace=2, first=2)
    layers = list(layers_of(model))
    assert losses.full_loss == pytest.approx(evaluate(model, rows, batch_size=3).loss, abs=rounding)
    for budgets in ([CONTEXT, CONTEXT, 6], [CONTEXT, 7, 6], [5, 7, CONTEXT]):
        measured = losses.measure(budgets)
        expected = evaluate(model, rows, kv_budget=Eviction(tuple(budgets), grace=2, first=2)).loss
        assert measured.loss == pytest.approx(expected, abs=rounding)
        losses.keep(measured)
    assert list(layers_of(model)) == layers
    assert abs(losses.loss - losses.full_loss) > 1e-6


def test_layers_with_a_window_keep_it(make_source: Callable[..., Any], rows: TokenDataset):
    model = heedful.patch(make_source("qwen2"), select_dim=4)  # the first layer alone has none
    search = BudgetSearch(model, rows, 1e9, grace=3)
    moves = list(search.moves())
    assert search.fixed == {1, 2} and {move.layer for move in moves} == {0}
    assert search.budgets == [4, CONTEXT, CONTEXT] and search.memory_factor == CONTEXT / 4
    assert search.eviction == Eviction((4, CONTEXT, CONTEXT), grace=3)
    assert search.loss == pytest.approx(evaluate(model, rows, kv_budget=search.eviction).loss, abs=1e-5)


def test_where_all_layers_slide(make_source: Callable[..., Any], rows: TokenDataset):
    """A layer that is not tried keeps its window, too; and a budget above the window is none."""
    model = heedful.patch(make_source("mistral", sliding_window=9), select_dim=4).double()
    let_them_vote(model)
    losses = BudgetedLoss(model, rows)
    assert losses.fixed == set()
    for budgets in ([CONTEXT, CONTEXT, 6], [CONTEXT, 12, 6], [5, 12, 6]):
        expected = evaluate(model, rows, kv_budget=budgets).loss
        assert losses.measure(budgets).loss == pytest.approx(expected, abs=1e-9)
    assert losses.measure([CONTEXT, 12, CONTEXT]).loss == pytest.approx(losses.full_loss, abs=1e-9)
    assert prove_budget(model, 7).held == (7, 7, 7)
    with pytest.raises(
        ValueError, match="nothing was evicted in 51 tokens that the model's sliding window lets"
    ):
        prove_budget(model, 12)


def test_a_stop_leaves_the_layers_as_they_were(make_source: Callable[..., Any], rows: TokenDataset):
    model = heedful.patch(make_source("llama"), select_dim=4)
    losses, layers = BudgetedLoss(model, rows), list(layers_of(model))

    def broken(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = layers[2].register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        losses.measure([CONTEXT, 6, 6])
    hook.remove()
    assert list(layers_of(model)) == layers and not any(layer._forward_pre_hooks for layer in layers)

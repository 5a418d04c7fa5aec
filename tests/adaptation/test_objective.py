"""The local objective against plain loops in float64, and what training meets against what a cache holds."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful.adaptation.learning import Forgetting, learning_layers, local_losses, start_selectors
from heedful.adaptation.objective import EVERY, attention_to_come, local_loss, votes_before
from heedful.attention.eviction import Eviction
from heedful.evaluation.loss import divergence
from heedful.hf.names import CACHE
from heedful.ops.eviction import Rule

LENGTH, SCALE = 6 * EVERY + 3, 0.4
HOWS: dict[str, dict[str, Any]] = {
    "retention": {},
    "retention, apart": {"per": "kv_head"},
    "votes": {"selector": "added", "select_dim": 4},
    "votes, apart": {"selector": "added", "select_dim": 4, "per": "kv_head"},
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(q: Tensor, k: Tensor, softcap: float | None) -> Tensor:
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * SCALE
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1)


@pytest.mark.parametrize(("selectors", "softcap"), [(1, None), (2, None), (1, 0.7)])
def test_attention_to_come(selectors: int, softcap: float | None):
    q, k = drawn(2, 4, LENGTH, 5), drawn(2, 2, LENGTH, 5, seed=1)
    got = attention_to_come(q, k, SCALE, selectors, softcap)
    weights = weights_of(q, k, softcap)[:, :, : LENGTH // EVERY * EVERY]
    assert got.shape == (2, selectors, LENGTH // EVERY, LENGTH)
    for r, n in itertools.product(range(selectors), range(LENGTH // EVERY)):
        heads = weights[:, r * 4 // selectors : (r + 1) * 4 // selectors]
        torch.testing.assert_close(got[:, r, n], heads[:, :, n * EVERY :].sum((1, 2)))


def test_votes_before():
    q, k = drawn(1, 2, LENGTH, 3), drawn(1, 2, LENGTH, 3, seed=1)
    got = votes_before(q, k, SCALE)
    for r, n in itertools.product(range(2), range(LENGTH // EVERY)):
        expected = torch.zeros(LENGTH, dtype=torch.float64)
        for i in range(n * EVERY):
            for j in range(1, i):
                expected[j] += max(0.0, float(q[0, r, i] @ k[0, r, j]) * SCALE)
        torch.testing.assert_close(got[0, r, n], expected)


@pytest.mark.parametrize("with_own", [False, True])
def test_local_loss_is_the_kl_of_a_forecast(with_own: bool):
    q, k = drawn(1, 2, LENGTH, 5), drawn(1, 1, LENGTH, 5, seed=1)
    select_q, select_k = drawn(1, 1, LENGTH, 3, seed=2), drawn(1, 1, LENGTH, 3, seed=3)
    own = drawn(1, 1, LENGTH, seed=4).abs() if with_own else None
    grace, first = 5, 2
    got = local_loss(q, k, (select_q, select_k), SCALE, own, grace=grace, first=first)
    to_come, F = attention_to_come(q, k, SCALE, 1)[0, 0], votes_before(select_q, select_k, SCALE)[0, 0]
    F = F if own is None else F + own[0]
    pieces = []
    for n in range(3, LENGTH // EVERY - 2):
        keys = slice(first, n * EVERY - grace + 1)
        target = to_come[n, keys] / to_come[n, keys].sum()
        pieces.append((target * (target.log() - (-F[n, keys]).log_softmax(-1))).sum())
    torch.testing.assert_close(got, torch.stack(pieces).mean())


def test_gradients_of_the_local_loss():
    q, k = drawn(1, 2, LENGTH, 5).requires_grad_(), drawn(1, 2, LENGTH, 5, seed=1)
    parts = [
        drawn(1, 2, LENGTH, 2, seed=2),
        drawn(1, 2, LENGTH, 2, seed=3),
        drawn(1, 2, LENGTH, seed=4).abs(),
    ]
    for part in parts:
        part.requires_grad_()

    def of(select_q: Tensor, select_k: Tensor, own: Tensor) -> Tensor:
        return local_loss(q, k, (select_q, select_k), SCALE, own, grace=2, first=1)

    assert torch.autograd.gradcheck(of, parts, atol=1e-6, fast_mode=True)
    of(*parts).backward()
    assert q.grad is None


def test_a_text_that_is_too_short():
    q = drawn(1, 1, 5 * EVERY - 1, 2)
    with pytest.raises(ValueError, match="has 80 tokens or more, got 79"):
        local_loss(q, q, (q, q), SCALE)


def let_them_choose(model: Any) -> None:
    start_selectors(model, [1.0] * len(learning_layers(model)))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in learning_layers(model):
            for weight in layer.score.parameters():
                weight.add_(torch.randn_like(weight) * 0.3)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_training_meets_what_a_cache_holds(
    family: str, how: str, make_source: Callable[..., Any], ids: Tensor
):
    model = heedful.patch(make_source(family), **HOWS[how])
    let_them_choose(model)
    with torch.no_grad():
        cache: Any = {CACHE: model.new_cache(Eviction(9, grace=3, first=2))}
        expected, full = model(ids, **cache).logits, model(ids, use_cache=False).logits
    with Forgetting(model, Rule(9, grace=3, first=2)) as forgetting:
        got = model(ids, use_cache=False).logits
        got.sum().backward()
        with forgetting.remembering(), torch.no_grad():
            torch.testing.assert_close(model(ids, use_cache=False).logits, full)
    torch.testing.assert_close(got.detach(), expected, rtol=1e-4, atol=1e-3)
    assert (expected - full).abs().max() > 0.1
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, full)  # nothing is left behind


def test_local_losses_leave_the_model_alone(make_source: Callable[..., Any]):
    model = heedful.patch(make_source("llama")).requires_grad_(False)
    for layer in learning_layers(model):
        layer.score.requires_grad_(True)
    ids = torch.randint(3, 90, (2, 128), generator=torch.Generator().manual_seed(0))
    alone = model(ids, use_cache=False).logits
    with local_losses(model, grace=4, first=2) as losses:
        output = model(ids, use_cache=False).logits
    assert torch.equal(output, alone) and not output.requires_grad
    assert len(losses) == 3 and all(loss.requires_grad and loss > 0 for loss in losses)
    torch.stack(losses).sum().backward()
    assert all(p.grad is not None for layer in learning_layers(model) for p in layer.score.parameters())


def test_divergence():
    p, q = drawn(2, 300, 7).float(), drawn(2, 300, 7, seed=1).float().requires_grad_()
    got = divergence(p, q)
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()
    torch.testing.assert_close(got, expected)
    (grad,) = torch.autograd.grad(got, q)
    (expected_grad,) = torch.autograd.grad(expected, q)
    torch.testing.assert_close(grad, expected_grad)

"""The search for a budget per layer: its loss is that of `evaluate`, its moves are those of a plain greedy loop."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heedful.data import TokenDataset
from heedful.evaluation import evaluate
from heedful.evaluation.search import BudgetedLoss, BudgetSearch, Move, ladder, split_rows
from heedful.evaluation.search_log import SearchLog
from heedful.hf import HeedfulConfig, HeedfulForCausalLM

VOCAB, CONTEXT, LAYERS = 20, 13, 3


def make_model(attention: str = "mha", score: Any = "selective", **more: Any) -> HeedfulForCausalLM:
    """A float64 model whose logits are large enough for evictions to matter."""
    torch.manual_seed(0)
    if attention == "gqa":
        more["num_key_value_heads"] = 1
    config = HeedfulConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        init_logit_std=2.0,
        attention=attention,
        score=score,
        **more,
    )
    return HeedfulForCausalLM(config).double().eval()


def make_rows(n: int = 7, padded: bool = True) -> TokenDataset:
    """Rows of random tokens; some end in padding, one begins with it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (n, CONTEXT), generator=generator)
    if not padded:
        return TokenDataset({"input_ids": ids, "labels": ids})
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    mask[4, 5:] = 0
    mask[5, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return TokenDataset({"input_ids": ids, "labels": labels, "attention_mask": mask})


@pytest.fixture(scope="module")
def model() -> HeedfulForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def target(model: HeedfulForCausalLM) -> float:
    """High enough for some twenty moves, low enough to freeze every layer."""
    return evaluate(model, make_rows()).loss + 0.05


def search(model: HeedfulForCausalLM, target: float, **more: Any) -> BudgetSearch:
    return BudgetSearch(model, make_rows(), target, **more)


# The loss, computed from the first layer that changed.


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("form", "policy"),
    [
        ({}, "selective"),
        ({"attention": "sas", "positions": "learned"}, "selective"),
        ({"attention": "gqa", "score": "softmax"}, "streaming"),
        ({"score": "softmax", "positions": "none"}, "h2o"),
        ({"score": ["selective", "softmax", "selective"]}, "tova"),
    ],
    ids=str,
)
def test_reused_inputs_give_the_loss_of_evaluate(form: dict[str, Any], policy: str, padded: bool):
    model, rows = make_model(**form), make_rows(padded=padded)
    losses = BudgetedLoss(model, rows, policy, batch_size=3)
    assert losses.full_loss == pytest.approx(evaluate(model, rows, batch_size=3).loss, abs=1e-10)
    seen = {losses.full_loss}
    for budgets, keep in (
        ([CONTEXT, CONTEXT, 4], False),
        ([CONTEXT, 6, CONTEXT], True),
        ([CONTEXT, 6, 3], True),
        ([5, 6, 3], False),
        ([CONTEXT, 4, 3], True),
        ([2, 4, 2], True),
        ([7, CONTEXT + 1, 9], True),  # back up again
    ):
        measured = losses.measure(budgets)
        expected = evaluate(model, rows, batch_size=3, kv_budget=budgets, kv_policy=policy).loss
        assert measured.loss == pytest.approx(expected, abs=1e-10)
        seen.add(round(measured.loss, 9))
        if keep:
            losses.keep(measured)
            assert losses.loss == measured.loss
            assert losses.measure(budgets).loss == measured.loss
    assert len(seen) == 8  # every budget matters


def test_only_the_layers_from_the_change_on_run(model: HeedfulForCausalLM):
    losses = BudgetedLoss(model, make_rows())
    runs: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
        for i, layer in enumerate(model.layers)
    ]
    try:
        for budgets, expected in (([CONTEXT, CONTEXT, 4], [2]), ([CONTEXT, 4, CONTEXT], [1, 2])):
            runs.clear()
            losses.measure(budgets)
            assert runs == expected
        runs.clear()
        losses.measure(losses.budgets)
        assert runs == []
    finally:
        for hook in hooks:
            hook.remove()


# The search.


def brute_force(model: HeedfulForCausalLM, rows: TokenDataset, target: float, policy: str) -> list[tuple]:
    """The greedy search as its definition reads, with nothing shared and everything measured."""

    def loss_of(budgets: list[int]) -> float:
        return evaluate(model, rows, kv_budget=budgets, kv_policy=policy).loss

    budgets, frozen, moves = [CONTEXT] * LAYERS, set(), []
    now = loss_of(budgets)
    while True:
        rates: dict[int, tuple[float, int, float]] = {}
        for layer in range(LAYERS):
            if layer in frozen or budgets[layer] == 2:
                continue
            lower = max(rung for rung in ladder(CONTEXT) if rung < budgets[layer])
            loss = loss_of([lower if i == layer else b for i, b in enumerate(budgets)])
            if loss > target:
                frozen.add(layer)
                moves.append((layer, lower, False, loss))
            else:
                rates[layer] = ((loss - now) / (budgets[layer] - lower), lower, loss)
        if not rates:
            return moves
        best = min(rates, key=lambda layer: rates[layer][0])
        _, budgets[best], now = rates[best]
        moves.append((best, budgets[best], True, now))


@pytest.mark.parametrize(
    ("form", "policy"), [({}, "selective"), ({"score": "softmax"}, "streaming")], ids=str
)
@pytest.mark.parametrize("room", [0.004, 0.05, 100.0])
def test_the_moves_are_those_of_a_plain_greedy_loop(form: dict[str, Any], policy: str, room: float):
    model, rows = make_model(**form), make_rows()
    goal = evaluate(model, rows).loss + room
    expected = brute_force(model, rows, goal, policy)
    eager = BudgetSearch(model, rows, goal, policy=policy, lazy=False)
    moves = list(eager.moves())
    assert [(m.layer, m.budget, m.accepted) for m in moves] == [move[:3] for move in expected]
    assert [m.loss for m in moves] == pytest.approx([move[3] for move in expected], abs=1e-9)
    assert eager.finished
    if room == 100.0:
        assert eager.budgets == [2] * LAYERS
        assert eager.memory_factor == CONTEXT / 2


@pytest.mark.parametrize("lazy", [True, False])
def test_the_target_is_never_exceeded(model: HeedfulForCausalLM, target: float, lazy: bool):
    going = search(model, target, lazy=lazy)
    accepted = 0
    for move in going.moves():
        assert (move.loss <= target) == move.accepted
        accepted += move.accepted
        if move.accepted:
            now = evaluate(model, make_rows(), kv_budget=going.budgets).loss
            assert going.loss == move.loss == pytest.approx(now, abs=1e-9)
    assert accepted > 5
    assert going.frozen
    assert going.memory_factor == CONTEXT * LAYERS / sum(going.budgets) > 1.5


def test_eager_measures_every_candidate(model: HeedfulForCausalLM, target: float):
    tried: list[tuple[int, int]] = []
    going = search(model, target, lazy=False, watch=lambda *trial: tried.append(trial))
    budgets, frozen = list(going.budgets), set(going.frozen)
    for move in going.moves():
        if not move.accepted:
            continue
        candidates = [
            (i, max(r for r in going.rungs if r < b))
            for i, b in enumerate(budgets)
            if i not in frozen and b > 2
        ]
        assert tried == candidates
        tried.clear()
        budgets, frozen = list(going.budgets), set(going.frozen)


def test_lazy_measures_less_and_takes_what_ranks_first(model: HeedfulForCausalLM, target: float):
    lazy, eager = search(model, target), search(model, target, lazy=False)
    lazy_moves, eager_moves = list(lazy.moves()), list(eager.moves())
    assert lazy_moves[0].measured == LAYERS
    assert lazy_moves[0] == eager_moves[0]
    assert sum(m.measured for m in lazy_moves) < 0.8 * sum(m.measured for m in eager_moves)
    frozen: set[int] = set()
    budgets = [CONTEXT] * LAYERS
    for move in lazy_moves:
        if not move.accepted:
            frozen.add(move.layer)
            continue
        open_layers = [i for i, b in enumerate(budgets) if i not in frozen and b > 2]
        assert move.rates[move.layer] == min(move.rates[i] for i in open_layers)  # type: ignore[type-var]
        budgets[move.layer] = move.budget


@pytest.mark.parametrize("lazy", [True, False])
def test_a_search_goes_on_as_it_would_have(model: HeedfulForCausalLM, target: float, lazy: bool):
    moves = list(search(model, target, lazy=lazy).moves())
    for done in range(len(moves) + 1):
        earlier = [Move.from_dict(json.loads(json.dumps(m.to_dict()))) for m in moves[:done]]
        assert earlier == moves[:done]
        rest = search(model, target, lazy=lazy, earlier=earlier)
        assert list(rest.moves()) == moves[done:]


def test_earlier_moves_that_cannot_be(model: HeedfulForCausalLM, target: float):
    first, second = list(search(model, target).moves())[:2]
    with pytest.raises(ValueError, match=r"move 1 of the earlier search lowers .* does not follow"):
        skipped = Move(first.layer, 2, True, first.loss, 1, first.rates, ())
        search(model, target, earlier=[skipped, second])
    with pytest.raises(ValueError, match="move 1 of the earlier search knows 1 layers, the model has 3"):
        search(model, target, earlier=[Move(first.layer, first.budget, True, 1.0, 1, (0.0,), ())])


def test_nothing_to_save(model: HeedfulForCausalLM, target: float):
    for goal in (target - 0.06, float("nan")):
        with pytest.raises(ValueError, match="already above the target of"):
            search(model, goal)


def test_unsound_arguments(model: HeedfulForCausalLM):
    rows = make_rows()
    with pytest.raises(ValueError, match="did you mean 'streaming'"):
        BudgetedLoss(model, rows, "streming")
    mixed = make_model(score=["selective", "softmax", "selective"])
    with pytest.raises(ValueError, match="layer 1 has 'softmax'; use another policy"):
        BudgetedLoss(mixed, rows)
    packed = TokenDataset({**make_rows(padded=False).tensors, "segment_ids": rows.tensors["input_ids"]})
    with pytest.raises(ValueError, match="rows with segment_ids mix documents"):
        BudgetedLoss(model, packed)
    silent = TokenDataset({**rows.tensors, "labels": torch.full_like(rows.tensors["labels"], -100)})
    with pytest.raises(ValueError, match="no token is labelled"):
        BudgetedLoss(model, silent)
    with pytest.raises(ValueError, match="budget must be a whole number >= 2"):
        BudgetedLoss(model, rows).measure([CONTEXT, 1, CONTEXT])
    with pytest.raises(ValueError, match="one entry per layer"):
        BudgetedLoss(model, rows).measure([4, 4])


# Ladder and rows.


@pytest.mark.parametrize("context", [2, 3, 4, 5, 7, 97, 128, 2048, 100_000])
def test_ladder(context: int):
    rungs = ladder(context)
    assert (rungs[0], rungs[-1]) == (context, 2)
    for above, below in itertools.pairwise(rungs):
        assert below < above
        assert below == above - 1 or below == pytest.approx(0.75 * above, abs=0.5)
    with pytest.raises(ValueError, match="context must be at least 2"):
        ladder(1)


@given(total=st.integers(2, 400), n_search=st.integers(1, 100))
def test_rows_to_search_and_to_report_on_never_meet(total: int, n_search: int):
    search_rows, report_rows = (
        part.tensors["x"][:, 0].tolist()
        for part in split_rows(TokenDataset({"x": torch.arange(total)[:, None]}), n_search)
    )
    assert len(search_rows) == min(n_search, total // 2)
    assert len(search_rows) // 2 <= len(report_rows) <= 5 * len(search_rows)
    assert not set(search_rows) & set(report_rows)
    assert search_rows == sorted(set(search_rows))
    assert report_rows == sorted(set(report_rows))
    if len(search_rows) >= 8:  # both come from everywhere
        for part in (search_rows, report_rows):
            assert part[0] < total / 4
            assert part[-1] >= 3 * total / 4
            gaps = [b - a for a, b in itertools.pairwise(part)]
            assert max(gaps) <= total / 8 + 2


def test_too_few_rows():
    with pytest.raises(ValueError, match=r"expected 2 rows or more, .*, got 1; use a longer text"):
        split_rows(TokenDataset({"x": torch.zeros(1, 4)}), 8)
    with pytest.raises(ValueError, match="the search needs 1 row or more, got 0"):
        split_rows(TokenDataset({"x": torch.zeros(8, 4)}), 0)


# The file.

SETTINGS = {"data": "a text", "rows": 3, "target": 3.25, "model": "abc"}
MOVE = Move(1, 9, True, 3.125, 3, (0.1, 0.2, None), ())


def test_log(tmp_path: Path):
    path = tmp_path / "budget.jsonl"
    log = SearchLog(path, SETTINGS)
    assert not path.exists()
    log.append(MOVE)
    log.append(MOVE)
    again = SearchLog(path, {**SETTINGS, "target": 3.25 + 1e-8})
    assert again.moves == [MOVE, MOVE]
    assert again.settings["target"] == 3.25
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # cut off while it was written
    cut = SearchLog(path, SETTINGS)
    assert cut.moves == [MOVE]
    cut.append(MOVE)
    assert path.read_bytes() == whole
    fresh = SearchLog(path, {**SETTINGS, "rows": 4}, restart=True)
    assert fresh.moves == []
    assert path.read_bytes() == whole
    fresh.append(MOVE)
    assert len(path.read_text().splitlines()) == 2


def test_log_of_another_search(tmp_path: Path):
    path = tmp_path / "budget.jsonl"
    SearchLog(path, SETTINGS).append(MOVE)
    for other, said in (
        ({"rows": 4}, "rows was 3, is 4"),
        ({"target": 3.5}, "target was 3.25, is 3.5"),
        ({"model": "abd"}, "the weights of the model are others"),
    ):
        with pytest.raises(ValueError, match=said):
            SearchLog(path, {**SETTINGS, **other})
    for damage in ("{\n", "[]\n", "{}\n", json.dumps(SETTINGS) + '\n{"layer": 1}\n'):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"is damaged .*delete or rename it, or pass --restart"):
            SearchLog(path, SETTINGS)
        assert path.read_text() == damage


def test_digest_of_rows():
    rows = make_rows()
    changed = {n: t.clone() for n, t in rows.tensors.items()}
    assert TokenDataset(changed).digest() == rows.digest()
    changed["labels"][0, 1] += 1
    assert TokenDataset(changed).digest() != rows.digest()

"""Variable assignment against a plain interpreter of its statements."""

from __future__ import annotations

import pytest
import torch

from heedful.data import answer_accuracy
from heedful.data.packing import IGNORE
from heedful.data.tasks.task import BOS
from heedful.data.tasks.variable_assignment import ASK, ASSIGN, VariableAssignment

PUBLISHED = [0, 1, 8, 14, 1, 6, 15, 1, 5, 10, 1, 6, 11]


def expected_labels(tokens: list[int], variables: int) -> list[int]:
    """Run the statements one by one; fails on a statement that breaks the rules of the task."""
    labels, memory = [IGNORE], {}
    assert tokens[0] == BOS
    for at in range(1, len(tokens), 3):
        operation, variable, value = tokens[at : at + 3]
        assert 3 <= variable < 3 + variables <= value
        if operation == ASSIGN:
            memory[variable] = value
            labels += [IGNORE] * 3
        else:
            assert operation == ASK
            assert memory[variable] == value  # a KeyError is a question about nothing
            labels += [IGNORE, IGNORE, value]
    return labels


@pytest.mark.parametrize(
    ("statements", "variables", "values"), [(32, 6, 8), (2, 1, 2), (7, 3, 2), (20, 30, 5)]
)
def test_against_the_interpreter(statements, variables, values):
    task = VariableAssignment(statements=statements, variables=variables, values=values)
    batch = task.draw(200, seed=1)
    assert batch["input_ids"].shape == batch["labels"].shape == (200, 3 * statements + 1)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert batch["input_ids"].max() < task.vocab_size
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert tokens[1] == ASSIGN
        assert labels == expected_labels(tokens, variables)


def test_default_sizes():
    task = VariableAssignment()
    assert task.draw(1)["input_ids"].shape == (1, 97)
    assert (task.length, task.vocab_size) == (97, 17)
    assert VariableAssignment(variables=2, values=3).vocab_size == 8


def test_the_sequences_of_published_results():
    """Drawn as they have always been."""
    assert VariableAssignment().draw(1, seed=3)["input_ids"][0, :13].tolist() == PUBLISHED


def test_distribution():
    tokens = VariableAssignment().draw(4000, seed=3)["input_ids"]
    operations, variables, values = tokens[:, 1::3], tokens[:, 2::3] - 3, tokens[:, 3::3] - 9
    asks = operations == ASK
    assert asks[:, 1:].double().mean() == pytest.approx(0.5, abs=0.01)
    for part in (variables[~asks], variables[:, -1], values[~asks]):
        shares = part.bincount() / len(part)
        assert shares.max() - shares.min() < 0.03
    # Two variables known: a question picks either with probability 1/2.
    two_known = ~asks[:, 0] & ~asks[:, 1] & asks[:, 2] & (variables[:, 0] != variables[:, 1])
    first = (variables[:, 2] == variables[:, 0])[two_known]
    assert first.double().mean() == pytest.approx(0.5, abs=0.07)


def test_deterministic_and_apart_from_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, same, other = (VariableAssignment().draw(50, seed=seed)["input_ids"] for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "least"), [("n", 1), ("statements", 2), ("variables", 1), ("values", 2)])
def test_sizes_below_their_minimum(name, least):
    arguments = {"n": 4, name: least - 1}
    with pytest.raises(ValueError, match=f"{name} .*must be at least {least}, got {least - 1}"):
        VariableAssignment(**{k: v for k, v in arguments.items() if k != "n"}).draw(arguments["n"])


def test_answer_accuracy_looks_one_position_back():
    labels = torch.tensor([[IGNORE, IGNORE, 1, IGNORE, 2]])
    logits = torch.zeros(1, 5, 4)
    logits[0, 1, 1] = 1.0  # right
    logits[0, 3, 3] = 1.0  # wrong
    assert answer_accuracy(logits, labels) == 0.5


def test_perfect_answers():
    batch = VariableAssignment().draw(8)
    logits = torch.nn.functional.one_hot(batch["input_ids"].roll(-1, dims=1), 17).float()
    assert answer_accuracy(logits, batch["labels"]) == 1.0


def test_answer_accuracy_without_questions():
    with pytest.raises(ValueError, match="nothing to score"):
        answer_accuracy(torch.zeros(2, 3, 4), torch.full((2, 3), IGNORE))


def test_answer_accuracy_with_other_shapes():
    with pytest.raises(ValueError, match=r"labels \(2, 3\), got \(2, 4, 5\)"):
        answer_accuracy(torch.zeros(2, 4, 5), torch.zeros(2, 3, dtype=torch.long))

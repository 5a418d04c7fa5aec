"""Every task against a reader of its own, written from its description alone."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.data import TASKS, load_data
from heedful.data.packing import IGNORE
from heedful.data.tasks import task_of
from heedful.training import TrainSettings

Row = list[int]
every_task = pytest.mark.parametrize("name", TASKS)


def answers(labels: Row) -> dict[int, int]:
    """Place and answer."""
    return {place: label for place, label in enumerate(labels) if label != IGNORE}


def read_variable_assignment(tokens: Row, task) -> dict[int, int]:
    said, memory = {}, {}
    for at in range(1, len(tokens), 3):
        operation, variable, value = tokens[at : at + 3]
        if operation == 1:
            memory[variable] = value
        else:
            said[at + 2] = memory[variable]
    return said


def read_variable_tracking(tokens: Row, task) -> dict[int, int]:
    said, memory = {}, {}
    for at in range(1, len(tokens), 3):
        operation, variable, third = tokens[at : at + 3]
        if operation == 1:
            memory[variable] = third
        elif operation == 2:
            memory[variable] = memory[third]
        else:
            said[at + 2] = memory[variable]
    return said


def read_mqar(tokens: Row, task) -> dict[int, int]:
    pairs = tokens[1 : 2 * task.pairs + 1]
    memory = dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert len(memory) == task.pairs
    # Which of the keys in the rest are asked for cannot be read: a random token may be a key.
    return {
        at + 1: memory[token] for at, token in enumerate(tokens) if at > 2 * task.pairs and token in memory
    }


def read_induction(tokens: Row, task) -> dict[int, int]:
    said, first = {}, None
    for at in range(1, len(tokens), 2):
        if tokens[at] == 1:
            if first is not None:
                said[at + 1] = first
            first = tokens[at + 1] if first is None else first
    assert tokens.count(1) == task.marks
    return said


def read_copy(tokens: Row, task) -> dict[int, int]:
    end = tokens.index(1)
    return dict(enumerate(tokens[1:end], end + 1))


def read_selective_copy(tokens: Row, task) -> dict[int, int]:
    end = tokens.index(1)
    kept = [token for token in tokens[1:end] if token != 2]
    assert len(kept) == task.symbols
    return dict(enumerate(kept, end + 1))


def read_sorting(tokens: Row, task) -> dict[int, int]:
    end = tokens.index(1)
    return dict(enumerate(sorted(tokens[1:end]), end + 1))


def read_needle(tokens: Row, task) -> dict[int, int]:
    said, memory = {}, {}
    for at in range(1, len(tokens), 3):
        mark, key, value = tokens[at : at + 3]
        if mark == 1:
            assert not said and key not in memory
            memory[key] = value
        elif mark == 2:
            said[at + 2] = memory[key]
    assert len(said) == len(memory) == task.needles
    return said


def read_parity(tokens: Row, task) -> dict[int, int]:
    ones = [token == 2 for token in tokens[1:-1]]
    return {2 + i: 3 + sum(ones[: i + 1]) % 2 for i in range(len(ones))}


READERS = {name: globals()["read_" + name.replace("-", "_")] for name in TASKS}


def check(task, n: int, seed: int) -> None:
    drawn = task.draw(n, seed)
    assert set(drawn) == {"input_ids", "labels"}
    for rows in drawn.values():
        assert rows.shape == (n, task.length) and rows.dtype == torch.long
        assert rows.max() < task.vocab_size
    for tokens, labels in zip(drawn["input_ids"].tolist(), drawn["labels"].tolist(), strict=True):
        assert tokens[0] == 0 and labels[0] == IGNORE and min(tokens) >= 0
        expected, found = READERS[task.name](tokens, task), answers(labels)
        assert found  # of a batch that asks nothing there is no loss
        if task.name == "mqar":
            assert len(found) == task.pairs and found.items() <= expected.items()
        else:
            assert found == expected


@every_task
def test_against_its_reader(name: str):
    check(TASKS[name](), 50, 1)


@every_task
@settings(max_examples=15)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_at_any_size(name: str, data: st.DataObject, seed: int):
    kind = TASKS[name]
    sizes = {f.name: data.draw(st.integers(kind.least.get(f.name, 1), 40)) for f in dataclasses.fields(kind)}
    try:
        task = kind(**sizes)
    except ValueError:
        return  # options that do not go together
    check(task, 3, seed)


@every_task
def test_longer_and_shorter(name: str):
    task = TASKS[name]()
    twice = task.times(2)
    assert 1.4 * task.length < twice.length < 2.1 * task.length
    assert twice.vocab_size == task.vocab_size
    check(twice, 5, 2)
    assert task.fit(task.length) == task
    shorter = task.fit(task.length - 1)
    assert shorter.length < task.length
    check(shorter, 5, 2)
    # Nothing between it and the context would have fitted.
    size = {task.grows: getattr(shorter, task.grows) + 1}
    assert dataclasses.replace(shorter, **size).length > task.length - 1
    with pytest.raises(ValueError, match=f"context must be at least .* for synthetic:{name} .*, got 2"):
        task.fit(2)


@every_task
def test_seeds(name: str):
    task = TASKS[name]()
    state = torch.get_rng_state()
    one, same, other = (task.draw(20, seed)["input_ids"] for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@every_task
def test_answers_are_spread_evenly(name: str):
    """No answer is so frequent that guessing it pays, and the tokens before it are none of them."""
    task = TASKS[name]()
    labels = task.draw(500, 3)["labels"]
    counts = labels[labels >= 0].bincount(minlength=task.vocab_size)
    said = counts[counts > 0]
    assert said.max() < 2 * said.float().mean()


def test_mqar_asks_soon_rather_than_late():
    """Zoology's power law: gaps before a query have a density like 1/gap."""
    task = TASKS["mqar"](pairs=4, tokens=512)
    labels = task.draw(400, 1)["labels"][:, 2 * 4 + 1 :]
    places = labels.ge(0).nonzero()[:, 1].double()
    early, late = (places < 64).double().mean(), (places > 256).double().mean()
    assert early > 0.45 and late < 0.3


@pytest.mark.parametrize("name", ["variable-assignment", "variable-tracking"])
def test_who_never_asked_asks_at_the_end(name: str):
    """All else is drawn as in longer sequences, whose first statements do not know which is the last."""
    short, longer = (TASKS[name](statements=n).draw(2000, 7) for n in (3, 4))
    size = short["labels"].shape[1]
    asked = longer["labels"][:, :size].ge(0).any(1)
    assert 0 < asked.sum() < len(asked)
    for key, rows in short.items():
        assert torch.equal(rows[asked], longer[key][asked, :size])
    assert torch.equal(short["input_ids"][:, :-3], longer["input_ids"][:, : size - 3])
    assert short["labels"][~asked, -1].ge(0).all()
    variables = short["input_ids"][~asked, -2].bincount()
    assert (variables > 0).sum() == TASKS[name]().variables  # whichever have a value


def test_options_by_name():
    assert task_of("synthetic:mqar", {"pairs": 16, "tokens": 128}) == TASKS["mqar"](pairs=16, tokens=128)
    assert task_of("austen", {}) is None
    wrong = [
        ("austen", {"pairs": 3}, "options of synthetic tasks; 'austen' is none"),
        ("synthetic:mqar", {"pears": 3}, "no option 'pears'; did you mean 'pairs'"),
        ("synthetic:mqr", {}, "no synthetic task 'mqr'; did you mean 'mqar'"),
        ("synthetic:mqar", {"pairs": 0}, "pairs of mqar must be at least 1, got 0"),
        ("synthetic:mqar", {"pairs": 1.5}, "pairs of mqar must be a whole number, got 1.5"),
        ("synthetic:mqar", {"pairs": 17}, "four tokens for each pair: 68 for 17 pairs, got 64"),
        ("synthetic:mqar", {"pairs": 16, "vocabulary": 20}, "needs as many keys as pairs"),
        ("synthetic:needle", {"needles": 17}, "as many keys as needles"),
        ("synthetic:induction", {"marks": 40}, "a pair for each of 40 marks, got 32"),
        ("synthetic:selective-copy", {"symbols": 50}, "a place for each of 50 symbols, got 48"),
    ]
    for data, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            task_of(data, options)
        with pytest.raises(ValueError, match=message):
            TrainSettings(data=data, task_options=options)


def test_as_data():
    data = load_data("synthetic:needle", train_examples=5, task_options={"needles": 2, "places": 8})
    assert data.task == TASKS["needle"](needles=2, places=8)
    assert (len(data.train), data.context, data.vocab_size) == (5, 31, 51)
    assert "2 needles, 8 places" in data.description


def test_more_kinds_of_tokens_than_memory_are_said_before_they_are_drawn():
    task = task_of("synthetic:needle", {"keys": 2**20})
    assert task is not None
    with pytest.raises(
        ValueError, match=r"drawn from 1,048,576 take 234 GiB to draw; use fewer kinds of tokens"
    ):
        task.draw(20_000, 0)

"""Tasks under budgets: groups, what is known of a measurement, what is refused."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason='pip install "heedful[tasks]"')

from lm_eval.tasks import TaskManager

from heedful.lm_eval.model import HeedfulLM
from heedful.lm_eval.run import measure
from heedful.lm_eval.tasks import Given, LoadedTask, load_tasks

TASK = """\
task: {name}
custom_dataset: !function made.{name}
output_type: multiple_choice
test_split: test
doc_to_text: ""
doc_to_target: 0
doc_to_choice: choices
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """\
group: both
task: [one, two]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
MADE = """\
from datasets import Dataset

def one(**given):
    return {"test": Dataset.from_list([{"choices": ["the cat", "cat the"], "part": "cats"}] * 2)}

def two(**given):
    return {"test": Dataset.from_list([{"choices": ["a dog sat", "dog a sat"], "part": "dogs"}] * 4)}
"""


def test_of_a_group_the_group_is_shown(trained: Path, tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name))
    (tmp_path / "both.yaml").write_text(GROUP)
    (tmp_path / "made.py").write_text(MADE)
    tasks = TaskManager(include_path=tmp_path, include_defaults=False).load(["both"])
    model = HeedfulLM(trained)
    seen: list[tuple[int, int, int]] = []
    results = list(
        measure(
            model,
            [LoadedTask("both", tasks, None)],
            [6, "full"],
            ["streaming"],
            progress=lambda *given: seen.append(given),
        )
    )
    assert [(r.policy, r.kv_budget, r.documents) for r in results] == [(None, "full", 6), ("streaming", 6, 6)]
    assert [(r.evicted, r.held == 6) for r in results] == [(False, False), (True, True)]
    for result in results:
        (figure,) = result.figures
        assert (figure.task, figure.metric) == ("both", "acc")
        share = (2 * result.parts["cats"]["acc"] + 4 * result.parts["dogs"]["acc"]) / 6
        assert figure.value == pytest.approx(share)
    assert [(n, done) for n, done, total in seen if done == total == 12] == [(0, 12), (1, 12)]


def test_policies_and_budgets_are_checked_before_anything_is_measured(trained: Path):
    model = HeedfulLM(trained)
    tasks = load_tasks(["copy"], Given(trained, lengths=(100,), examples=1))
    for budgets, policies, message in (
        ([8], ["best"], "'best'"),
        ([[8, 8, 8]], ["streaming"], "one entry per layer"),
        ([1], ["streaming"], "budget"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(model, tasks, budgets, policies)

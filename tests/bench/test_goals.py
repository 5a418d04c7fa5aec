"""benchmarks/goals.py: figures on the disk are judged where a goal was stated for them."""

import io
import json

import goals
import pytest
from goals import EVERY_KEY, PLAIN, TWIN, Goal, goals_table, judge, read, shown_goal, shown_ratio
from rich.console import Console

SETTINGS = {
    "bench": "kernels",
    "workload": "train",
    "length": 2048,
    "threads": 1,
    "device": "cpu",
    "dtype": "fp32",
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 64,
    "batch": 1,
    "command": "heedful bench kernels",
    "picked": False,
}


def row(case: str, seconds: float, extra_bytes: int | None = None, **more: object) -> dict[str, object]:
    return {**SETTINGS, "case": case, "seconds": seconds, "extra_bytes": extra_bytes, **more}


ROWS = [
    row(PLAIN, 1.0, 100),
    row(TWIN, 1.1, 100),
    row("selective, blocked", 1.0, 50, picked=True),
    row(EVERY_KEY, 1.4, 50),
    row("x-transformers", 5.0, 1000),
]


def test_goals_are_judged():
    verdicts = {(v.row["case"], v.against): v for v in judge(ROWS)}
    assert set(verdicts) == {(TWIN, PLAIN), (EVERY_KEY, PLAIN), ("selective, blocked", "x-transformers")}
    assert verdicts[TWIN, PLAIN].ratio == pytest.approx(1.1) and verdicts[TWIN, PLAIN].met
    assert verdicts[EVERY_KEY, PLAIN].met is False
    assert verdicts["selective, blocked", "x-transformers"].met  # 5x exactly
    memory = Goal("kernels", "train", (2048,), goals.PICKED, "x-transformers", 1 / 20, "extra memory")
    (verdict,) = judge(ROWS, [memory])
    assert (verdict.ratio, verdict.met) == (0.05, True)
    assert list(judge(ROWS[:3], [memory])) == []


@pytest.mark.parametrize(
    "other", [{"threads": 4}, {"dtype": "fp16"}, {"heads": 4}, {"length": 512}, {"bench": "x"}]
)
def test_goals_hold_only_where_they_were_stated(other: dict[str, object]):
    assert list(judge([{**r, **other} for r in ROWS])) == []


def test_each_number_of_threads_is_judged():
    verdicts = list(judge([*ROWS, *({**r, "threads": 2, "seconds": 1.0} for r in ROWS)]))
    assert [(v.row["threads"], v.met) for v in verdicts if v.row["case"] == EVERY_KEY] == [
        (1, False),
        (2, True),
    ]


def test_disturbed_figures_are_not_judged():
    verdicts = list(judge([{**r, "disturbed": "busy"} for r in ROWS]))
    assert verdicts
    assert {(v.ratio, v.met) for v in verdicts} == {(None, None)}
    screen = io.StringIO()
    Console(file=screen, width=100).print(goals_table(verdicts, 100))
    assert "foreign" in screen.getvalue()
    assert "missed" not in screen.getvalue()


def test_figures_are_read(tmp_path):
    (tmp_path / "kernels.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    decode = {"case": "selective slots, T/16", "context": 8192, "threads": 1}
    (tmp_path / "decode.jsonl").write_text(json.dumps(decode) + "\n")
    rows = read([tmp_path])
    assert [(r["bench"], r["workload"], r["length"]) for r in rows] == [
        ("decode", "decode", 8192),
        ("kernels", "train", 2048),
    ]
    assert read([tmp_path / "kernels.jsonl"]) == rows[1:]


def test_every_goal_can_be_read():
    """Names in the goals are names of cases, so that none is missed for a letter."""
    from heedful.bench import decode, forms, kernels, models, prefill

    known = {goals.PICKED, kernels.EVERY_KEY, forms.TWIN, forms.X_TRANSFORMERS, models.MHA, models.SELECTIVE}
    known |= {models.SAS, prefill.pruned_name(512), "plain SDPA", goals.SAS, goals.PUBLISHED}
    known |= {case.name for case in decode.decode_cases(64, [4, 16], n_heads=2, head_dim=4, compiled=False)}
    for goal in goals.GOALS:
        assert {goal.case, goal.against} <= known, goal


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits(width: int):
    verdicts = list(judge(ROWS))
    screen = io.StringIO()
    Console(file=screen, width=width).print(goals_table(verdicts, width))
    assert "…" not in screen.getvalue()
    assert (shown_ratio(0.18, 0.2, "time"), shown_goal(0.2, "time")) == ("5.6x faster", "≥ 5x faster")
    assert (shown_ratio(0.05, 0.05, "extra memory"), shown_goal(1.05, "time")) == ("20x less", "≤ 1.05")

"""The comparison with kvpress: what counts as the same, and that what is committed is."""

import json
from pathlib import Path

import pytest
from kvpress_check.compare import GRACE, Row

RESULTS = Path(__file__).parents[2] / "results" / "kvpress"


@pytest.mark.parametrize(
    ("row", "same"),
    [
        (Row("tova", "", 6, 6, 96, 1, scores_off=1e-7), True),
        (Row("tova", "", 6, 5, 96, 1, scores_off=1e-7), False),
        (Row("tova", "", 6, 6, 96, 1, scores_off=1e-5), False),
        (Row("tova", "", 6, 6, 96, 1, scores_off=float("nan")), False),
        (Row("tova", "", 6, 6, 25, logits_off=1e-3), False),
    ],
)
def test_what_counts_as_the_same(row: Row, same: bool):
    assert row.same == same


def test_what_is_committed():
    rows = [Row(**json.loads(line)) for line in (RESULTS / "kvpress.jsonl").read_text().splitlines()]
    assert {row.policy for row in rows} == set(GRACE)
    assert all(row.same and row.sets for row in rows)
    readme = (RESULTS / "README.md").read_text()
    for row in rows:
        start = f"| {row.policy} |"
        assert any(
            line.startswith(start) and f"| {row.how} | {row.same_sets} of {row.sets} |" in line
            for line in readme.splitlines()
        )

"""From runs to numbers: means, spreads, paired differences, and the sentence about seeds."""

import dataclasses
from collections.abc import Callable
from statistics import stdev
from typing import Any

import pytest
from rich.console import Console

from heedful.comparison.table import markdown_table, noise_note, one_rate_note, rich_table, rows, summarise
from heedful.training import RunResult


@pytest.fixture
def result() -> Callable[..., RunResult]:
    def make(attention: str, seed: int, loss: float, **more: Any) -> RunResult:
        fields: dict[str, Any] = {
            "attention": attention,
            "score": "softmax",
            "seed": seed,
            "lr": 1e-3,
            "params": 1000,
            "flops_per_token": 2_500_000,
            "tokens": 100,
            "val_loss": loss,
            "val_bpb": loss / 2,
            "val_accuracy": 0.5,
            "seconds_per_step": 0.02,
            "tokens_per_second": 1.0,
            "cache_bytes_per_token": 64,
            "curve": [(100, loss, 0.2)],
            "config": {},
        }
        return RunResult(**{**fields, **more})

    return make


@pytest.fixture
def two_forms(result: Callable[..., RunResult]) -> list[RunResult]:
    losses = {"mha": [2.0, 2.2, 2.4], "sas": [1.9, 2.0, 2.45]}
    return [result(name, seed, loss) for name, of in losses.items() for seed, loss in enumerate(of)]


def test_numbers(two_forms: list[RunResult]):
    mha, sas = summarise(two_forms)
    assert (mha.name, sas.name) == ("mha x softmax", "sas x softmax")
    assert mha.loss == pytest.approx(2.2)
    assert mha.spread == pytest.approx(stdev([2.0, 2.2, 2.4]))
    assert sas.loss == pytest.approx(2.35 - 0.7 / 3)
    assert sas.differences == pytest.approx([-0.1, -0.2, 0.05])
    assert sas.mean_of("val_bpb") == pytest.approx(sas.loss / 2)


def test_markdown(two_forms: list[RunResult]):
    header, _, mha, sas = (
        line.strip("| ").split(" | ") for line in markdown_table(summarise(two_forms)).split("\n")
    )
    assert len(header) == len(mha) == len(sas)
    row = dict(zip(header, sas, strict=True))
    assert row["form"] == "sas x softmax"
    assert row["seeds"] == "3"
    assert row["loss"] == f"{(1.9 + 2.0 + 2.45) / 3:.3f} ± {stdev([1.9, 2.0, 2.45]):.3f}"
    # t of 2 degrees of freedom is 4.303; the deviation of -0.1, -0.2, 0.05 is 0.1258
    assert row["vs first"] == "-0.083 (-0.396 to +0.229)"
    assert row["parameters"] == "1,000"
    assert row["FLOPs/token"] == "2.50 M"
    assert row["ms/step"] == "20"
    assert row["cache B/token"] == "64"
    assert dict(zip(header, mha, strict=True))["vs first"] == "first"
    assert "answers" not in header  # a synthetic task's


def test_synthetic_task(result: Callable[..., RunResult]):
    table = markdown_table(summarise([result("mha", 0, 1.0, val_bpb=None, val_accuracy=0.123)]))
    assert "bits/byte" not in table
    assert "| 12.3% |" in table


def test_seeds_that_are_not_shared(result: Callable[..., RunResult]):
    table = markdown_table(summarise([result("mha", 0, 1.0), result("sas", 1, 1.0)]))
    assert "| no common seed |" in table


def test_notes(result: Callable[..., RunResult], two_forms: list[RunResult]):
    one = [result("mha", 0, 1.0), result("sas", 0, 2.0)]
    assert noise_note(summarise(one)).startswith("**One seed: this table does not rank the forms.**")
    assert "| +1.000 |" in markdown_table(summarise(one))
    assert noise_note(summarise(two_forms)).startswith("3 seeds. The difference is paired")
    assert noise_note(summarise([*two_forms, result("mqa", 0, 1.0)])).startswith("**One seed")  # the fewest
    assert noise_note(summarise(one[:1])) == "One form only: there is nothing to compare with."


def test_fits_a_terminal(two_forms: list[RunResult]):
    """Nothing is cropped in 80 columns, the spread beside the difference least of all."""
    wide = [dataclasses.replace(r, params=1_234_567, cache_bytes_per_token=13_056) for r in two_forms]
    wide = [dataclasses.replace(r, score="selective") for r in wide]
    console = Console(width=80)
    with console.capture() as shown:
        console.print(rich_table(summarise(wide), "title"))
    text = " ".join(shown.get().split())
    for cell in ("mha x selective", "sas x selective", "2.200", "± 0.200", "-0.083", "(-0.396 to", "+0.229)"):
        assert cell in text, shown.get()
    for cell in ("B/token", "bits/byte", "1,234,567", "13,056", "first", "1.100"):
        assert cell in text, shown.get()


def test_a_narrow_terminal_keeps_what_was_held_equal(two_forms: list[RunResult]):
    """And names the columns that it leaves out."""
    console = Console(width=60)
    with console.capture() as shown:
        console.print(rich_table(summarise(two_forms), "title", 60, keep="FLOPs/token"))
    assert (
        "2.50 M" in shown.get()
        and "narrow screen, left out: " in shown.get()
        and "cache B/token" in shown.get()
    )


def test_steps_that_differ_have_a_column(result: Callable[..., RunResult]):
    some = [result(n, 0, 1.0, config={"train": {"steps": s}}) for n, s in (("mha", 100), ("sas", 57))]
    assert "| 57 |" in markdown_table(summarise(some))
    assert "steps" not in markdown_table(summarise(some[:1]))


def test_answers_of_a_task_are_compared_seed_by_seed(result: Callable[..., RunResult]):
    first = [result("mha", seed, 1.0, val_bpb=None, val_accuracy=0.5 + 0.1 * seed) for seed in range(3)]
    other = [result("sas", seed, 1.0, val_bpb=None, val_accuracy=0.7 + 0.1 * seed) for seed in range(3)]
    headers, cells = rows(summarise([*first, *other]))
    column = headers.index("answers vs first")
    assert [row[column] for row in cells] == ["first", "+20.0 % (+20.0 % to +20.0 %)"]


def test_one_learning_rate_for_all_is_said(result: Callable[..., RunResult]):
    two = summarise([result("mha", 0, 1.0), result("sas", 0, 1.0)])
    assert one_rate_note(two).startswith("One learning rate, 0.001, for all forms: ")
    assert one_rate_note(two[:1]) == ""

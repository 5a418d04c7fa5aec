"""How long a comparison takes, and the line about each run."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import heedful.comparison.timetable as module
from heedful.comparison import CompareSettings, compare
from heedful.comparison.timetable import Timetable, duration, seconds_per_step
from heedful.training.run import load_settings_data

Settings = Callable[..., CompareSettings]


def screen(width: int = 200) -> Console:
    return Console(file=io.StringIO(), width=width)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def steps_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of a step of each form, instead of a trial; empty: a trial is no use."""
    seconds: dict[str, float] = {}
    monkeypatch.setattr(module, "seconds_per_step", lambda form, data: seconds[form.attention])
    return seconds


def test_a_trial_says_how_long_all_runs_take(settings: Settings, steps_of: dict[str, float]):
    steps_of |= {"mha": 0.1, "sas": 0.4}
    s = settings(steps=600, evaluations=1)
    data = load_settings_data(s.train)
    console = screen()
    times = Timetable({"mha x softmax": 3, "sas x softmax": 3}, {"mha x softmax": 1}, console)
    forms = s.forms(data.vocab_size, data.context)
    times.announce(forms, data)
    # 2 x 600 x 0.1 s + 3 x 600 x 0.4 s = 14 min, and a little for evaluations
    assert lines(console) == [
        "time 5 runs of 600 steps: about 14 min (mha x softmax 100 ms a step, sas x softmax 400 ms a step)"
    ]
    assert 840 < times.left() < 860

    times.next(forms[0])  # finished before
    times.next(forms[0], seconds=120)  # twice the 61 s that were promised: so will it be with the others
    times.next(forms[0], seconds=120)
    assert 1400 < times.left() < 1440
    times.next(forms[1], failed=True)
    times.next(forms[1], seconds=300)
    assert times.left() == 300
    assert times.titles(forms) == ["1/6 mha x softmax, seed 0", "2/6 sas x softmax, seed 0"]
    assert times.titles(forms[1:]) == ["3/6 sas x softmax, seed 0"]


def test_the_baseline_at_other_lengths_is_counted(settings: Settings, tmp_path: Path):
    """In the number of runs, in the time, and by name."""
    console = screen()
    s = settings(steps=3, seeds=2, baseline_steps=(2, 31))
    compare(s, tmp_path, console=console)
    said = lines(console)
    assert any(line.startswith("time 8 runs of 2, 3 or 31 steps: about ") for line in said)
    titles = [line.split(":")[0] for line in said if "/8 " in line]
    forms = ["mha x softmax", "sas x softmax", "mha x softmax, 2 steps", "mha x softmax, 31 steps"]
    wanted = [f"{form}, seed {seed}" for seed in (0, 1) for form in forms]
    assert titles == [f"{i}/8 {name}" for i, name in enumerate(wanted, 1)]
    assert "compute multiplier" in map(str.strip, said)
    assert "Above 1 the form saves compute" in " ".join(" ".join(said).split())
    again = screen()
    compare(s, tmp_path, console=again)
    assert not [line for line in lines(again) if line.startswith("time")]


def test_short_runs_are_not_tried(settings: Settings, steps_of: dict[str, float]):
    s = settings(steps=29)
    console = screen()
    times = Timetable({"mha x softmax": 1, "sas x softmax": 1}, {}, console)
    times.announce(s.forms(257, 32), load_settings_data(s.train))
    assert not lines(console)


def test_a_form_that_fails_its_trial_is_left_to_its_run(settings: Settings, steps_of: dict[str, float]):
    steps_of |= {"mha": 0.1}
    s = settings(steps=600)
    console = screen()
    times = Timetable({"mha x softmax": 1, "sas x softmax": 1}, {}, console)
    times.announce(s.forms(257, 32), load_settings_data(s.train))
    assert "(mha x softmax 100 ms a step)" in lines(console)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trial_draws_nothing(settings: Settings, precision: str):
    s = settings(precision=precision).train
    data = load_settings_data(s)
    before = torch.get_rng_state()
    once = seconds_per_step(s, data)
    assert 0 < once < 5
    assert torch.equal(torch.get_rng_state(), before)


def test_a_line_per_run(settings: Settings, tmp_path: Path):
    console = screen()
    s = settings()
    compare(s, tmp_path, console=console)
    said = [line for line in lines(console) if "validation loss" in line and "/2 " in line]
    assert [line.split(":")[0] for line in said] == ["1/2 mha x softmax, seed 0", "2/2 sas x softmax, seed 0"]
    assert " s; about " in said[0]
    assert said[0].endswith(" s left")
    assert "left" not in said[1]
    again = screen()
    compare(s, tmp_path, console=again)
    assert sum(line.endswith("finished before") for line in lines(again)) == 2
    assert not [line for line in lines(again) if line.startswith("time")]


def test_a_sweep_counts_nowhere_else(settings: Settings, tmp_path: Path):
    console = screen()
    compare(settings(attention=("mha",), lr_sweep=(1e-3, 1e-2), seeds=2), tmp_path, console=console)
    said = [line.split(":")[0] for line in lines(console) if "/4 " in line]
    assert said[:2] == ["1/4 mha x softmax, lr 0.001", "2/4 mha x softmax, lr 0.01"]
    assert [line[:31] for line in said[2:]] == [f"{n}/4 mha x softmax, seed {n - 3}, lr 0" for n in (3, 4)]


def test_estimate_of_a_whole_comparison(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "WORTH_A_TRIAL", 1)
    console = screen()
    compare(settings(attention=("mha",)), tmp_path, console=console)
    (said,) = [line for line in lines(console) if line.startswith("time")]
    assert said.startswith("time 1 run of 3 steps: about ")
    assert said.endswith(" ms a step)")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (40.4, "40 s"), (89, "89 s"), (840, "14 min"), (5340, "89 min"), (11520, "3.2 h")],
)
def test_duration(seconds: float, words: str):
    assert duration(seconds) == words


def test_brief_progress_has_no_line_per_evaluation(settings: Settings, tmp_path: Path):
    from heedful.training import train

    full, brief = screen(), screen()
    more: dict[str, Any] = {"data": load_settings_data(settings().train)}
    train(settings().train, tmp_path / "full", console=full, **more)
    train(settings().train, tmp_path / "brief", console=brief, title="1/1", **more)
    assert len([line for line in lines(full) if "validation loss" in line]) == 3
    assert not lines(brief)

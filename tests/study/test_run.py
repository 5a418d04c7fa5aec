"""A study as a whole: what it writes, that it goes on, and that its page says what its rows say."""

import dataclasses
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console

import heedful.comparison.jobs as jobs
from heedful.files import Locked, folder_locked
from heedful.machine import device_name
from heedful.study import Study, run_study
from heedful.study.report import write_report
from heedful.study.rows import read_rows

Make = Callable[..., Study]


def go(study: Study, place: Path, **how: Any) -> str:
    said = io.StringIO()
    run_study(study, place / "results", place / "models", console=Console(file=said, width=200), **how)
    return said.getvalue()


def test_the_whole_way(study: Make, tmp_path: Path):
    budgets = {"kept": [4, 8, 64], "policies": {"selective": ["selective"], "softmax": ["streaming"]}}
    both = {"arm": "selective", "against": "mha"}
    contrasts = [{**both, "claims": claims} for claims in ("lower", "higher", "equal")]
    s = study(lengths=[2, 8], budgets=budgets, contrasts=contrasts)
    said = go(s, tmp_path)
    assert (
        "effect looked for: 0.1 in loss, 10 seeds find it" in said and "8 of 8 runs to train: about" in said
    )
    assert re.search(r"trained for \d+ s\n", said)
    out = tmp_path / "results"
    assert {p.name for p in out.iterdir()} == {
        *(
            "README.md",
            "budgets.jsonl",
            "caches.png",
            "figure.png",
            "runs.jsonl",
            "study.json",
            "sweep.jsonl",
            "times.json",
        )
    }
    rows, sweep = read_rows(out / "runs.jsonl"), read_rows(out / "sweep.jsonl")
    assert sorted(r["run"] for r in rows) == [
        *("mha-seed0", "mha-seed1", "mha-steps2-seed0", "mha-steps2-seed1", "mha-steps8-seed0"),
        *("mha-steps8-seed1", "selective-seed0", "selective-seed1"),
    ]
    assert {r["seed"] for r in sweep} == {1000} and len(sweep) == 4
    for arm in ("mha", "selective"):
        best = min((r for r in sweep if r["arm"] == arm), key=lambda r: r["val_loss"])["lr"]
        assert {r["lr"] for r in rows if r["arm"] == arm} == {best}
    page = (out / "README.md").read_text()
    loss = {(r["arm"], r["seed"]): r["val_loss"] for r in rows if r["role"] == "seed"}
    difference = mean(loss["selective", seed] - loss["mha", seed] for seed in (0, 1))
    assert f"`selective` minus `mha` is {difference:+.4f} (95 %: " in page
    counted = re.search(r"\. Of the other contrasts (.*)\.\n", page)
    assert counted is not None and sum(map(int, re.findall(r"\d+", counted[1]))) == 2
    assert "**Verdict: " in page and "2 planned, 2 there" in page and "from 2, 4, 8 steps of `mha`" in page
    assert "| `selective` | selective | " in page and "| `mha` | streaming | " in page
    kept = {(r["run"], r["policy"], r["kv_budget"]) for r in read_rows(out / "budgets.jsonl")}
    assert (
        ("selective-seed1", "selective", 8) in kept
        and ("mha-seed0", None, "full") in kept
        and len(kept) == 12
    )
    assert {row["device"] for row in rows} == {
        device_name()
    } and f"**Trained on** {device_name()}; steps" in page
    assert "**Sweep of learning rates**" in page and "may be a better one: `mha`, `selective`." in page
    assert matplotlib.image.imread(out / "figure.png").shape[1] > 1000


def test_it_goes_on(study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[str] = []
    real = jobs.train

    def spy(settings: Any, out: Path, **more: Any) -> Any:
        trained.append(out.name)
        if out.name == "selective-seed1" and trained.count(out.name) == 1:
            raise RuntimeError("no room")
        return real(settings, out, **more)

    monkeypatch.setattr(jobs, "train", spy)
    s = study(rates=[1e-3])
    measured = {"device": "a clock", "seconds": {"mha": 1.0, "selective": 1.5}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "times.json").write_text(json.dumps(measured))
    with pytest.raises(RuntimeError, match="1 runs failed: selective-seed1: no room; the others are kept"):
        go(s, tmp_path)
    assert trained == [
        "selective-seed0",
        "mha-seed0",
        "selective-seed1",
        "mha-seed1",
    ]  # seed by seed, the longest first
    assert not (tmp_path / "results" / "sweep.jsonl").exists()
    trained[:] = ["selective-seed1"]
    go(s, tmp_path, seeds=3)
    assert trained[1:] == ["selective-seed1", "selective-seed2", "mha-seed2"]
    assert json.loads((tmp_path / "results" / "times.json").read_text()) == measured
    assert "3 paired seeds" in (tmp_path / "results" / "README.md").read_text()


def test_other_settings_are_not_mixed(study: Make, tmp_path: Path):
    s = study(rates=[1e-3])
    go(s, tmp_path)
    arms = {**s.arms, "mha": dataclasses.replace(s.arms["mha"], steps=5)}
    with pytest.raises(ValueError, match=r"as it was before \(mha differ\)"):
        go(dataclasses.replace(s, arms=arms), tmp_path)
    with pytest.raises(ValueError, match=r"as it was before \(effect differ\)"):
        go(dataclasses.replace(s, effect=5.0), tmp_path)
    claim = dataclasses.replace(s.contrasts[0], claims="equal")
    with pytest.raises(ValueError, match=r"\(what is claimed of selective against mha differ\)"):
        go(dataclasses.replace(s, contrasts=(claim,)), tmp_path)
    more = {**s.arms, "mqa": dataclasses.replace(s.arms["mha"], attention="mqa")}
    go(dataclasses.replace(s, arms=more), tmp_path)
    assert len(read_rows(tmp_path / "results" / "runs.jsonl")) == 6


def test_a_task(study: Make, tmp_path: Path):
    task = {
        "data": "synthetic:copy",
        "task_options": {"symbols": 4},
        "context": 10,
        "batch_size": 4,
        "steps": 2,
    }
    s = study(
        metric="accuracy at 4x", train={**task, "d_model": 16, "n_layers": 1, "n_heads": 2}, rates=[1e-3]
    )
    go(s, tmp_path)
    page = (tmp_path / "results" / "README.md").read_text()
    assert "| right | at 2x | at 4x |" in page and "synthetic:copy" in page
    assert set(read_rows(tmp_path / "results" / "runs.jsonl")[0]["accuracy_at"]) == {"1", "2", "4"}


def test_the_command(
    heedful: Callable[..., Any], written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written(rates=[1e-3])
    monkeypatch.chdir(tmp_path)
    assert "not run" in heedful("study").out
    assert "run it first" in heedful("study", "votes", "--report").error(1)
    heedful("study", "votes")
    assert (tmp_path / "results" / "votes" / "README.md").exists()
    page = (tmp_path / "results" / "votes" / "README.md").read_text()
    os.remove(tmp_path / "results" / "votes" / "README.md")
    heedful("study", "votes", "--report")
    assert (tmp_path / "results" / "votes" / "README.md").read_text() == page
    assert json.loads((tmp_path / "results" / "votes" / "study.json").read_text())["claim"] == "votes help"
    said = " ".join(heedful("study").out.split())
    assert any(word in said for word in ("holds", "does not hold", "not resolved"))
    assert "did you mean 'votes'" in heedful("study", "vote").error(1)
    assert "--seeds must be 2 or more" in heedful("study", "votes", "--seeds", "1").error(2)
    assert "no [scale.gpu] in it" in heedful("study", "votes", "--scale", "gpu").error(1)


@pytest.mark.slow
def test_a_form_of_its_own_side_by_side(study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Named by the study, found by the processes that train."""
    monkeypatch.setenv("HEEDFUL_FORMS", "")
    form = Path(__file__).parents[2] / "examples" / "shared_kv.py"
    s = study(forms=[str(form)], arms={"mha": {}, "selective": {"attention": "shared_kv"}}, rates=[1e-3])
    assert re.search(r"trained for \d+ s; 2 workers, \d+% busy\n", go(s, tmp_path, workers=2))
    rows = read_rows(tmp_path / "results" / "runs.jsonl")
    assert sorted((r["attention"], r["seed"]) for r in rows) == [
        (attention, seed) for attention in ("mha", "shared_kv") for seed in (0, 1)
    ]


def test_a_damaged_row_is_named(study: Make, tmp_path: Path):
    s = study(rates=[1e-3])
    go(s, tmp_path)
    path = tmp_path / "results" / "runs.jsonl"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 4, is damaged .*delete that line"):
        go(s, tmp_path)


def test_what_another_study_has_trained_is_taken_over(study: Make, tmp_path: Path):
    s = study(rates=[1e-3])
    go(s, tmp_path)
    quiet = Console(file=io.StringIO())
    beside = tmp_path / "other"
    (tmp_path / "results").rename(tmp_path / "first")
    more = {"again": s.arms["selective"], "mqa": dataclasses.replace(s.arms["mha"], attention="mqa")}
    run_study(dataclasses.replace(s, arms={**s.arms, **more}), beside, tmp_path / "models-2", console=quiet)
    rows = {row["run"]: row for row in read_rows(beside / "runs.jsonl")}
    taken = {name for name, row in rows.items() if row.get("study") == "first"}
    assert taken == {f"{arm}-seed{seed}" for arm in ("mha", "selective", "again") for seed in (0, 1)}
    assert {p.name for p in (tmp_path / "models-2").iterdir()} == {"mqa-seed0", "mqa-seed1"}
    assert rows["again-seed1"]["val_loss"] == rows["selective-seed1"]["val_loss"]
    assert "; 6 of 8 runs are those of `first`" in (beside / "README.md").read_text()


def test_data_that_has_changed_is_not_mixed(study: Make, text_file: Path, tmp_path: Path):
    """Neither with runs of the study, nor with those of another."""
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    small = {"data": str(text), "d_model": 16, "n_layers": 1, "n_heads": 2, "context": 32}
    s = study(rates=[1e-3], train={**small, "batch_size": 4, "steps": 4})
    go(s, tmp_path)
    text.write_text(text_file.read_text().replace("e", "o"))
    with pytest.raises(ValueError, match=r"text\.txt has changed since \w+-seed\d in .*; use another --out"):
        go(s, tmp_path, seeds=3)
    (tmp_path / "results").rename(tmp_path / "first")
    run_study(s, tmp_path / "other", tmp_path / "more", console=Console(file=io.StringIO()))
    assert not [row for row in read_rows(tmp_path / "other" / "runs.jsonl") if "study" in row]


def test_a_study_that_is_damaged_lends_no_runs(study: Make, tmp_path: Path):
    s = study(rates=[1e-3])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "runs.jsonl").write_text('{"run": "mha-se')
    said = go(s, tmp_path)
    assert "not looked at: " in said and "line 1, is damaged" in said
    (tmp_path / "torn" / "runs.jsonl").write_text("3\n")
    assert "it is no table" in go(s, tmp_path)


def test_what_is_measured_further_is_trained(study: Make, tmp_path: Path):
    go(study(rates=[1e-3]), tmp_path)
    (tmp_path / "results").rename(tmp_path / "first")
    budgets = {
        "kept": [4],
        "policies": {"selective": ["selective"], "softmax": ["streaming"]},
        "arms": ["mha"],
    }
    go(study(rates=[1e-3], budgets=budgets), tmp_path)
    rows = read_rows(tmp_path / "results" / "runs.jsonl")
    assert {row["arm"] for row in rows if "study" in row} == {"selective"}
    assert {row["arm"] for row in read_rows(tmp_path / "results" / "budgets.jsonl")} == {"mha"}


def test_an_arm_that_comes_back_is_as_it_was(study: Make, tmp_path: Path):
    s = study(rates=[1e-3])
    more = {**s.arms, "mqa": dataclasses.replace(s.arms["mha"], attention="mqa")}
    go(dataclasses.replace(s, arms=more), tmp_path)
    go(dataclasses.replace(s, contrasts=()), tmp_path)  # without the arm, and without the claim
    other = {**more, "mqa": dataclasses.replace(more["mqa"], d_ff=8)}
    with pytest.raises(ValueError, match=r"as it was before \(mqa differ\)"):
        go(dataclasses.replace(s, arms=other), tmp_path)
    claim = dataclasses.replace(s.contrasts[0], claims="higher")
    with pytest.raises(ValueError, match=r"\(what is claimed of selective against mha differ\)"):
        go(dataclasses.replace(s, contrasts=(claim,)), tmp_path)
    go(dataclasses.replace(s, arms=more), tmp_path)
    assert "gone" not in json.loads((tmp_path / "results" / "study.json").read_text())


def test_rows_of_other_settings_are_refused(study: Make, tmp_path: Path):
    s = study(rates=[1e-3])
    go(s, tmp_path)
    os.remove(tmp_path / "results" / "study.json")
    arms = {**s.arms, "mha": dataclasses.replace(s.arms["mha"], d_ff=8)}
    with pytest.raises(ValueError, match="runs of other settings under these names: mha-seed0, mha-seed1"):
        go(dataclasses.replace(s, arms=arms), tmp_path)


def test_a_run_counts_once(study: Make, tmp_path: Path):
    s, path = study(rates=[1e-3]), tmp_path / "results" / "runs.jsonl"
    go(s, tmp_path)
    page = (tmp_path / "results" / "README.md").read_text()
    path.write_text(2 * path.read_text())
    write_report(s, tmp_path / "results")
    assert (tmp_path / "results" / "README.md").read_text() == page
    with folder_locked(tmp_path / "results"), pytest.raises(Locked, match="another process works in"):
        go(s, tmp_path)


def test_a_last_line_without_an_end(study: Make, tmp_path: Path):
    s, path = study(rates=[1e-3]), tmp_path / "results" / "runs.jsonl"
    go(s, tmp_path)
    path.write_text(path.read_text().rstrip("\n"))
    go(s, tmp_path, seeds=3)
    assert len(read_rows(path)) == 6


def test_nothing_is_taken_over_where_it_is_not_wanted(study: Make, tmp_path: Path):
    s, quiet = study(rates=[1e-3]), Console(file=io.StringIO())
    go(s, tmp_path)
    run_study(s, tmp_path / "other", tmp_path / "models-2", console=quiet, take_over=False)
    assert not [row for row in read_rows(tmp_path / "other" / "runs.jsonl") if "study" in row]


def test_accuracy_in_small_caches(study: Make, tmp_path: Path):
    task = {
        "data": "synthetic:copy",
        "task_options": {"symbols": 4},
        "context": 10,
        "batch_size": 4,
        "steps": 2,
    }
    budgets = {"kept": [4], "policies": {"selective": ["selective"]}}
    small = {"d_model": 16, "n_layers": 1, "n_heads": 2}
    s = study(metric="accuracy", train={**task, **small}, rates=[1e-3], budgets=budgets, contrasts=[])
    go(s, tmp_path)
    page = (tmp_path / "results" / "README.md").read_text()
    assert "**Accuracy with small caches**" in page
    assert re.search(r"\| `selective` \| selective \| \d+\.\d% \| \d+\.\d% \|", page)


def test_text_of_the_user_is_no_markup(study: Make, tmp_path: Path):
    s = study(rates=[1e-3], title="does it help [/b]?", arms={"mha": {}, "selective": {"score": "selective"}})
    assert "does it help [/b]?" in go(s, tmp_path)


def test_another_folder_tries_from_nothing(
    heedful: Callable[..., Any], written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written(rates=[1e-3])
    monkeypatch.chdir(tmp_path)
    first = heedful("study", "votes").out
    assert "the first contrast decides the verdict: " in first and "selective vs mha" in first
    heedful("study", "votes", "--out", "runs/again")
    assert (tmp_path / "runs" / "again" / "models" / "mha-seed0").is_dir()
    page = (tmp_path / "runs" / "again" / "README.md").read_text()
    assert "heedful study votes --out runs/again --workers 2" in page and "are those of" not in page
    assert "--report trains none" in heedful("study", "votes", "--seeds", "3", "--report").error(2)
    written(rates=[1e-3], train={"data": "prose", "context": 32})
    assert "trains on 'prose', and there is no such file or folder here; name a text of your own: --data" in (
        heedful("study", "votes", "--out", "runs/prose").error(1)
    )

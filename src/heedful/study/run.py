"""Running a study: steps in turns, the sweep, the seeds, the baseline at other lengths, small caches."""

import dataclasses
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback

from heedful.comparison.jobs import Outcome, Run, data_key, run_all
from heedful.comparison.sweep import SWEEP_SEED, at_the_edge
from heedful.comparison.timetable import ROUNDS, duration, seconds_per_step
from heedful.data import Data
from heedful.evaluation.kv_budget import evaluate_budgets
from heedful.files import folder_locked, write_text
from heedful.hf.load import load_model, load_tokenizer
from heedful.machine import device_name
from heedful.screen import spinner
from heedful.study.plan import Budgets, Contrast, Study
from heedful.study.report import write_report
from heedful.study.rows import OtherStudies, append_row, read_rows, read_runs, read_table, same_settings
from heedful.study.sweep import best_rates
from heedful.study.verdict import Verdict
from heedful.training import RunResult, TrainSettings, held_out
from heedful.training.run import RESULT, load_settings_data
from heedful.training.workers import side_by_side

MEASURED_ROWS = 64
"""Rows of held-out text that small caches are measured on."""


def run_study(
    study: Study,
    out: Path,
    models: Path,
    *,
    console: Console,
    workers: int = 1,
    ray: str | None = None,
    seeds: int | None = None,
    take_over: bool = True,
    again: str | None = None,
) -> list[Verdict]:
    """Run what is missing of a study, and write what it says.

    `out` gets `times.json` (seconds of a step, measured in turns, and on what), `sweep.jsonl`, `runs.jsonl` (a row
    per run), `budgets.jsonl` where caches are measured, `README.md` and its figure. Every run is kept as soon as it
    ends; the same call goes on.

    Args:
        study: what to run.
        out: the folder of results.
        models: the folder of the models.
        console: where progress is shown.
        workers: runs at a time, each with its share of the cores.
        ray: a Ray cluster to run them on instead.
        seeds: fewer or more than the study's own.
        take_over: take a run that a study beside `out` has, with the very same settings, from there, unless its
            model is needed.
        again: the command that the page gives, see `write_report`.

    Returns:
        What came out, a verdict for each contrast that has two seeds.

    Raises:
        ValueError: if `out` holds a study of this name with other settings.
        Locked: if another process runs it there.
        Interrupted: after Ctrl-C.
        RuntimeError: if runs failed; the others are written.
    """
    seeds = seeds or study.seeds
    out.mkdir(parents=True, exist_ok=True)
    with folder_locked(out):
        write_text(out / "study.json", json.dumps(check_same(study, out), indent=2) + "\n")
        console.print(f"[bold]{escape(study.title)}[/bold]\n{escape(study.claim)}", highlight=False)
        few = f", fewer than these {study.needed}: it may stay unresolved" if seeds < study.needed else ""
        console.print(
            f"effect looked for: {study.effect:g} in {study.metric}, {study.needed} seeds find it in four of five "
            f"cases if the spread is {study.spread:g}; {seeds} seeds{few}; {len(study.arms)} arms",
            highlight=False,
        )
        times = _times(study, out, console)
        runner = _Runner(out, models, console, workers, ray, times, take_over)
        _train(study, runner, seeds)
        found = write_report(study, out, again)
    if runner.failures:
        raise RuntimeError(
            f"{len(runner.failures)} runs failed: {'; '.join(runner.failures)}; the others are kept"
        )
    return found


def _train(study: Study, runner: "_Runner", seeds: int) -> None:
    """The sweep, the seeds, and what is measured of their models."""
    rates = _sweep(study, runner, seeds)
    arms = {name: dataclasses.replace(s, lr=rates[name]) for name, s in study.arms.items() if name in rates}
    wanted: dict[str, tuple[str, str, TrainSettings]] = {}
    for seed in range(seeds):
        for name, settings in arms.items():
            wanted[f"{name}-seed{seed}"] = (name, "seed", dataclasses.replace(settings, seed=seed))
        for steps in study.lengths if study.baseline in arms else ():
            longer = dataclasses.replace(arms[study.baseline], seed=seed, steps=steps)
            wanted[f"{study.baseline}-steps{steps}-seed{seed}"] = (study.baseline, "length", longer)
    measured = {
        run: what
        for run, what in wanted.items()
        if study.budgets is not None and what[1] == "seed" and study.budgets.has(what[0], what[2].score)
    }
    runner.run(wanted, "runs.jsonl", models=measured)
    if study.budgets is not None:
        _measure(study.budgets, measured, runner)


class _Runner:
    """Runs with names, and the rows that they leave."""

    def __init__(
        self,
        out: Path,
        models: Path,
        console: Console,
        workers: int,
        ray: str | None,
        times: Mapping[str, float],
        take_over: bool,
    ) -> None:
        self.out, self.models, self.console = out, models, console
        self.workers, self.ray, self.times = workers, ray, times
        self.failures: list[str] = []
        self.others = OtherStudies(out, lend=take_over)
        self.known: dict[str, str] = {}
        for what in self.others.damaged:
            console.print(f"[yellow]not looked at[/yellow]: {escape(what)}", highlight=False)
        self.device = "a Ray cluster" if ray is not None else device_name()

    def run(
        self, wanted: Mapping[str, tuple[str, str, TrainSettings]], file: str, models: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Train those that have no row in `file` yet; all their rows. Of `models` a row alone will not do."""
        path = self.out / file
        rows = {row["run"]: row for row in read_runs(path)}
        if other := [n for n, (_, _, s) in wanted.items() if n in rows and not same_settings(rows[n], s)]:
            raise ValueError(
                f"{path} has runs of other settings under these names: {', '.join(other)}; use another --out, or "
                "move the results away"
            )
        absent = {name: what for name, what in wanted.items() if name not in rows}
        digests = self._digests([settings for _, _, settings in absent.values()])
        self._check_data([row for name, row in rows.items() if name in wanted], digests)
        for name, (arm, role, settings) in absent.items():
            if name in models:
                continue
            if (found := self.others.find(settings, digests[_data_of(settings.to_dict())])) is None:
                continue
            rows[name] = {**found[1], "run": name, "arm": arm, "role": role, "study": found[0]}
            append_row(path, rows[name])
            loss, where = f"loss {found[1]['val_loss']:.3f}", self.out.parent / found[0]
            self.console.print(
                f"{escape(name)}: {loss}, taken over from {where}, the same run", highlight=False
            )
        missing = {name: what for name, what in wanted.items() if name not in rows}
        if missing:
            seconds = sum(self.times[arm] * settings.steps for arm, _, settings in missing.values())
            at_a_time = f", {self.workers} at a time" if self.workers > 1 else ""
            self.console.print(
                f"{len(missing)} of {len(wanted)} runs to train{at_a_time}: about "
                f"{duration(seconds / self.workers)}",
                highlight=False,
            )
        runs = [
            Run(
                s,
                self.models / name,
                f"{i}/{len(missing)} {name}",
                dataclasses.replace(s, seed=0, steps=1, lr=1e-3),
            )
            for i, (name, (_, _, s)) in enumerate(self._longest_first(missing), 1)
        ]

        began, trained = time.perf_counter(), [0.0]

        def done(run: Run, outcome: Outcome) -> None:
            name = run.folder.name
            trained[0] += outcome.seconds or 0.0
            if outcome.result is None:
                self.failures.append(f"{name}: {outcome.reason}")
                self.console.print(f"[red]failed[/red] {escape(self.failures[-1])}", highlight=False)
                return
            arm, role, _ = wanted[name]
            head = {"run": name, "arm": arm, "role": role, "device": self.device}
            row = head | outcome.result.to_dict()
            rows[name] = json.loads(json.dumps(row))
            append_row(path, row)
            took = f", {duration(outcome.seconds)}" if outcome.seconds is not None else ""
            self.console.print(f"{escape(run.title)}: {_said(outcome.result)}{took}", highlight=False)

        run_all(runs, self.console, done, workers=self.workers, ray=self.ray)
        took, workers = time.perf_counter() - began, min(self.workers, len(runs))
        if trained[0] and self.ray is None:
            busy = f"; {workers} workers, {trained[0] / (took * workers):.0%} busy" if workers > 1 else ""
            self.console.print(f"trained for {duration(took)}{busy}", highlight=False)
        return [rows[name] for name in wanted if name in rows]

    def _digests(self, runs: Sequence[TrainSettings]) -> dict[str, str]:
        """Of the data of these runs, each read once."""
        for settings in runs:
            key = _data_of(settings.to_dict())
            if key not in self.known:
                with spinner(self.console, f"reading {settings.data}"):
                    self.known[key] = load_settings_data(dataclasses.replace(settings, seed=0)).digest()
        return self.known

    def _check_data(self, rows: Sequence[Mapping[str, Any]], digests: Mapping[str, str]) -> None:
        """Raise if some runs that are there are of other data of the same name."""
        for row in rows:
            train, before = row["config"]["train"], row.get("data_digest")
            if before is not None and digests.get(_data_of(train), before) != before:
                what = f"{train['data']} has changed since {row['run']} in {self.out}"
                raise ValueError(f"{what}; use another --out")

    def _longest_first(
        self, runs: Mapping[str, tuple[str, str, TrainSettings]]
    ) -> list[tuple[str, tuple[str, str, TrainSettings]]]:
        """Seed by seed, so that a stop leaves whole seeds; of a seed the longest first, so that none ends alone."""
        return sorted(
            runs.items(), key=lambda run: (run[1][2].seed, -self.times[run[1][0]] * run[1][2].steps)
        )


@dataclass(frozen=True)
class _Caches:
    """A trained model with small caches; its rows."""

    run_name: str
    arm: str
    settings: TrainSettings
    folder: Path
    kept: tuple[int, ...]
    policies: tuple[str, ...]
    steps: int = 1

    @property
    def title(self) -> str:
        """What it is called."""
        return f"caches of {self.run_name}"

    def run(self, console: Console, callbacks: Sequence[TrainerCallback] = ()) -> list[dict[str, Any]]:
        """Measure."""
        model, text = load_model(self.folder), not self.settings.data.startswith("synthetic:")
        rows = held_out(self.folder, load_tokenizer(self.folder) if text else None).part(0, MEASURED_ROWS)
        budgets: list[int | str] = [k for k in self.kept if k < self.settings.context]
        head = {"run": self.run_name, "arm": self.arm, "seed": self.settings.seed}
        return [
            {**head, **dataclasses.asdict(found)}
            for found in evaluate_budgets(model, rows.rows, [*budgets, "full"], self.policies, decoded=16)
        ]


def _measure(budgets: Budgets, wanted: Mapping[str, tuple[str, str, TrainSettings]], runner: _Runner) -> None:
    path = runner.out / "budgets.jsonl"
    there = {row["run"] for row in read_rows(path)}
    jobs = []
    for name, (arm, _, settings) in wanted.items():
        if name in there:
            continue
        folder = runner.models / name
        if (folder / RESULT).exists():
            jobs.append(_Caches(name, arm, settings, folder, budgets.kept, budgets.policies[settings.score]))
        else:
            runner.console.print(
                f"the caches of {escape(name)} are not measured: its model is not in {escape(str(folder))}",
                highlight=False,
            )

    def done(number: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            append_row(path, row)

    side_by_side(jobs, runner.console, runner.workers, done)


def _sweep(study: Study, runner: _Runner, seeds: int) -> dict[str, float]:
    """The learning rate of each arm with the lowest validation loss; the one there is, where only one is tried."""
    if len(study.rates) == 1:
        return dict.fromkeys(study.arms, study.rates[0])
    wanted = {
        f"{name}-lr{lr:g}-sweep": (name, "sweep", dataclasses.replace(s, lr=lr, seed=SWEEP_SEED))
        for lr in study.rates
        for name, s in study.arms.items()
    }
    after = seeds * sum(runner.times[name] * s.steps for name, s in study.arms.items()) / runner.workers
    runner.console.print(
        f"a sweep of {len(study.rates)} learning rates first, then {seeds} seeds of {len(study.arms)} arms: all "
        f"seeds together take about {duration(after)}",
        highlight=False,
    )
    rows = runner.run(wanted, "sweep.jsonl")
    best = best_rates(study, rows)
    if edge := at_the_edge(best, study.rates):
        runner.console.print(
            f"best at the edge of the sweep: {escape(', '.join(edge))}; another rate in `rates` may be better",
            highlight=False,
        )
    return best


def _times(study: Study, out: Path, console: Console) -> dict[str, float]:
    """Seconds of a training step of each arm, in turns, the fastest of some; measured once."""
    path = out / "times.json"
    if path.exists():
        before: dict[str, float] = read_table(path, "seconds")["seconds"]
        if set(before) >= set(study.arms):
            return before
    found: dict[str, list[float]] = {name: [] for name in study.arms}
    loaded: dict[str, Data] = {}  # by what says which data it is
    with spinner(console, "measuring steps of each arm, in turns"):
        for _ in range(ROUNDS):
            for name, settings in study.arms.items():
                key = _data_of(settings.to_dict())
                if key not in loaded:
                    loaded[key] = load_settings_data(settings)
                found[name].append(seconds_per_step(settings, loaded[key]))
    times = {name: min(seconds) for name, seconds in found.items()}
    write_text(path, json.dumps({"device": device_name(), "seconds": times}, indent=2) + "\n")
    return times


def _data_of(settings: Mapping[str, Any]) -> str:
    """Which data a run trains on: all seeds of a study on that of seed 0."""
    return data_key({**settings, "seed": 0})


def _said(result: RunResult) -> str:
    if result.accuracy_at is None:
        return f"loss {result.val_loss:.3f}"
    return "right " + ", ".join(f"{share:.1%} at {times}x" for times, share in result.accuracy_at.items())


def check_same(study: Study, out: Path) -> dict[str, Any]:
    """The study as plain data.

    Raises:
        ValueError: if `out` has results of this study as it was not: with other settings of an arm, or another
            declaration. More seeds, arms and contrasts may join.
    """
    path = out / "study.json"
    now: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(study)))
    if path.exists():
        before = read_table(path, "arms", "rates", "metric", "lengths", "effect", "spread", "contrasts")
        gone = before.get("gone", {"arms": {}, "contrasts": []})
        known, claims = {**gone["arms"], **before["arms"]}, [*gone["contrasts"], *before["contrasts"]]
        changed = [name for name in known.keys() & now["arms"].keys() if known[name] != now["arms"][name]]
        declared = ("rates", "metric", "lengths", "effect", "spread")
        changed += [name for name in declared if before[name] != now[name]]
        claimed: dict[str, set[str]] = {}
        for c in claims:
            claimed.setdefault(_sides(c), set()).add(c["claims"])
        changed += [
            f"what is claimed of {c['arm']} against {c['against']}"
            for c in now["contrasts"]
            if c["claims"] not in claimed.get(_sides(c), {c["claims"]})
        ]
        if changed:
            raise ValueError(
                f"{out} holds results of this study as it was before ({', '.join(sorted(changed))} differ); put it "
                f"back, use another --out, or move the results away"
            )
        # What was left out since: it may come back, but only as it was.
        arms = {name: of for name, of in known.items() if name not in now["arms"]}
        here = {_sides(c) for c in now["contrasts"]}
        contrasts = [c for c in claims if _sides(c) not in here]
        if arms or contrasts:
            now["gone"] = {"arms": arms, "contrasts": contrasts}
    return now


def _sides(contrast: dict[str, Any]) -> str:
    """What a contrast compares, whatever it claims; with what is newer than a file at its default."""
    whole = {**dataclasses.asdict(Contrast("", "", "lower")), **contrast}
    return json.dumps({k: v for k, v in whole.items() if k not in ("claims", "says")}, sort_keys=True)

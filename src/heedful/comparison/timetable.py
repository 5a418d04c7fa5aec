"""How long a comparison takes: from a few steps of each form at first, then from its finished runs."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console

from heedful.comparison.sweep import SWEEP_SEED
from heedful.data import Data
from heedful.files import write_text
from heedful.hf.modeling import HeedfulForCausalLM
from heedful.screen import spinner
from heedful.training import RunResult, TrainSettings
from heedful.training.run import curve_rows

TRIAL_STEPS = 3
"""Steps of a form that are tried before it trains; the first warms up and does not count."""
WORTH_A_TRIAL = 10 * TRIAL_STEPS
"""Runs of fewer steps are over sooner than they are estimated."""
ROUNDS = 5
"""Trials of each form, in turns, where equal seconds are asked for; the fastest counts."""
_STARTING = 1.0  # seconds that a run takes beside its steps: making the model, saving it


class Timetable:
    """What runs are to come and how long they take.

    Args:
        planned: number of runs of each kind: of a form, by its name, or of the baseline at another number of steps
            (`longer_name`).
        finished: how many of them are finished already.
        console: where to say it.
        workers: runs at a time.
    """

    def __init__(
        self, planned: Mapping[str, int], finished: Mapping[str, int], console: Console, workers: int = 1
    ) -> None:
        self.to_come = {name: max(runs - finished.get(name, 0), 0) for name, runs in planned.items()}
        self.total = sum(planned.values())
        self.console, self.workers = console, workers
        self.number = 0
        self.tried: dict[str, float] = {}
        self.measured: dict[str, list[float]] = {}

    def announce(self, runs: Sequence[TrainSettings], data: Data) -> None:
        """Try some steps of each form and say how long all runs take.

        Args:
            runs: one of each kind.
            data: to try them on.
        """
        runs = [run for run in runs if self.to_come[self._kind(run)]]
        steps = sorted({run.steps for run in runs})
        if not runs or steps[-1] < WORTH_A_TRIAL:
            return
        of_step: dict[str, float] = {}
        with spinner(self.console, "trying some steps of each form"):
            for run in runs:
                form = form_name(run)
                try:
                    of_step[form] = of_step.get(form) or seconds_per_step(run, data)
                except Exception:  # the run itself will say what is wrong with this form
                    continue
                self.tried[self._kind(run)] = _STARTING + of_step[form] * _steps_of_a_run(run, data)
        if self.tried:
            n = sum(self.to_come.values())
            what = "1 run" if n == 1 else f"{n} runs"
            lengths = " or ".join(filter(None, (", ".join(f"{n:,}" for n in steps[:-1]), f"{steps[-1]:,}")))
            each = ", ".join(f"{form} {1000 * seconds:.0f} ms a step" for form, seconds in of_step.items())
            said = f"{what} of {lengths} steps: about {duration(self.left())} ({each})"
            self.console.print(f"[bold]time[/bold] {said}", highlight=False)

    def titles(self, runs: Sequence[TrainSettings]) -> list[str]:
        """The number and the name of the runs that are next."""
        titles = []
        for settings in runs:
            self.number += 1
            what = f"lr {settings.lr:g}" if settings.seed == SWEEP_SEED else f"seed {settings.seed}"
            titles.append(f"{self.number}/{self.total} {self._kind(settings)}, {what}")
        return titles

    def finished(self, title: str, settings: TrainSettings, result: RunResult, seconds: float | None) -> None:
        """One line about a run; `seconds` is what it took, None where it was finished before."""
        self.next(settings, seconds)
        took = "finished before" if seconds is None else f"in {duration(seconds)}"
        remaining = self.left()
        left = f"; about {duration(remaining)} left" if remaining else ""
        known = result.lr == TrainSettings().lr or settings.seed == SWEEP_SEED
        lr = "" if known else f", lr {result.lr:g}"
        self.console.print(
            f"{title}{lr}: validation loss {result.val_loss:.3f}, {took}{left}", highlight=False
        )

    def next(self, settings: TrainSettings, seconds: float | None = None, failed: bool = False) -> None:
        """One run is behind us, which took `seconds`, or which failed."""
        kind = self._kind(settings)
        if seconds is not None or failed:
            self.to_come[kind] = max(self.to_come[kind] - 1, 0)
        if seconds is not None:
            self.measured.setdefault(kind, []).append(seconds)

    def left(self) -> float:
        """Seconds that the runs to come take."""
        both = [name for name in self.measured if name in self.tried]
        # what runs took over what their trials promised: a trial knows nothing of a machine's load later
        ratio = mean(mean(self.measured[n]) / self.tried[n] for n in both) if both else 1.0
        measured = [seconds for runs in self.measured.values() for seconds in runs]
        total = 0.0
        for name, runs in self.to_come.items():
            if name in self.measured:
                one = mean(self.measured[name])
            elif name in self.tried:
                one = ratio * self.tried[name]
            else:
                one = mean(measured) if measured else 0.0
            total += runs * one
        return total / self.workers

    def _kind(self, settings: TrainSettings) -> str:
        longer = longer_name(settings)
        return longer if longer in self.to_come else form_name(settings)


def form_name(settings: TrainSettings) -> str:
    """As in the table."""
    return f"{settings.attention} x {settings.score}"


def longer_name(settings: TrainSettings) -> str:
    """That of the baseline at another number of steps."""
    return f"{form_name(settings)}, {settings.steps:,} steps"


def seconds_per_step(settings: TrainSettings, data: Data, steps: int = TRIAL_STEPS) -> float:
    """Seconds of an optimizer step of this form, from a model that is thrown away.

    Args:
        settings: of the run.
        data: whose first rows are taken.
        steps: how many are tried, the first of them to warm up.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = found or torch.device("cpu")
    accumulated = settings.trainer.get("gradient_accumulation_steps", 1)
    rows = {name: tensor[: settings.batch_size].to(device) for name, tensor in data.train.tensors.items()}
    seconds = []
    with torch.random.fork_rng():  # a trial draws nothing that a run would have drawn
        model = HeedfulForCausalLM(settings.to_config(data.vocab_size, data.context, data.bos_token_id))
        model.to(device).train()  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
        for _ in range(steps):
            began = time.perf_counter()
            with (
                torch.autocast(device.type, torch.bfloat16) if settings.precision == "bf16" else nullcontext()
            ):
                loss = model(**rows, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            seconds.append(time.perf_counter() - began)
    return accumulated * mean(seconds[1:] or seconds)


def at_equal_seconds(
    forms: Sequence[TrainSettings], data: Data, out: Path, console: Console
) -> list[TrainSettings]:
    """The forms with as many steps as take the seconds of the first; measured once, kept in `out/seconds.json`."""
    path = out / "seconds.json"
    seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [form for form in forms if form_name(form) not in seconds]
    if missing:
        # The first form takes part in every round: what is compared was measured together.
        measured = [forms[0], *(form for form in missing if form is not forms[0])]
        rounds: dict[str, list[float]] = {form_name(form): [] for form in measured}
        with spinner(console, "measuring steps of each form, in turns"):
            for _ in range(ROUNDS):
                for form in measured:
                    rounds[form_name(form)].append(seconds_per_step(form, data))
        best = {name: min(found) for name, found in rounds.items()}
        first = seconds.setdefault(form_name(forms[0]), best[form_name(forms[0])])
        seconds |= {form_name(f): best[form_name(f)] / best[form_name(forms[0])] * first for f in missing}
        write_text(path, json.dumps(seconds, indent=2) + "\n")
    wanted = seconds[form_name(forms[0])] * forms[0].steps
    return [dataclasses.replace(f, steps=max(1, round(wanted / seconds[form_name(f)]))) for f in forms]


def _steps_of_a_run(settings: TrainSettings, data: Data) -> float:
    """Steps of a run, its evaluations counted as a third of a step for as many rows."""
    evaluated = len(data.validation) + settings.evaluations * len(curve_rows(data.validation))
    rows = settings.batch_size * settings.trainer.get("gradient_accumulation_steps", 1)
    return settings.steps + evaluated / (3 * rows)


def duration(seconds: float) -> str:
    """In words of two digits: 40 s, 14 min, 3.2 h."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"

"""Running a comparison: every form, every seed, and what it leaves in its folder."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from heedful.comparison.jobs import Outcome, Run, run_all
from heedful.comparison.matching import HELD_EQUAL
from heedful.comparison.multiplier import multipliers
from heedful.comparison.plot import plot_curves
from heedful.comparison.settings import CompareSettings
from heedful.comparison.sweep import SWEEP_SEED, Losses, best_of, edge_note, sweep_markdown, write_sweep
from heedful.comparison.table import markdown_table, noise_note, one_rate_note, rich_table, summarise
from heedful.comparison.timetable import Timetable, at_equal_seconds, form_name, longer_name
from heedful.data import Data
from heedful.files import holds_something, write_text
from heedful.training import RunResult, TrainSettings
from heedful.training.run import RESULT, check_memory, load_settings_data
from heedful.training.settings import missing_settings

SIDE_BY_SIDE = "Runs were trained side by side: milliseconds per step compare no forms."


def compare(
    settings: CompareSettings,
    out: str | Path,
    *,
    console: Console | None = None,
    data: Data | None = None,
    workers: int = 1,
    ray: str | None = None,
) -> list[RunResult]:
    """Train every form with every seed and write the comparison.

    `out` gets `results.jsonl` (a row per run), `summary.md`, `compare.png`, the models under `runs/`,
    `sweep.jsonl` after a learning-rate sweep, and `baseline.jsonl` with the first form at other numbers of steps.
    Called again with the same settings it goes on where it stopped. A run that fails is reported and does not lose
    the others; calling again tries it again.

    Args:
        settings: what to compare.
        out: the folder; made if missing.
        console: where to show progress and the table.
        data: loaded data; default: what the settings name.
        workers: runs at a time, each with its share of the cores.
        ray: a Ray cluster to run them on: its address, "auto", or "local" for one on this machine.

    Returns:
        The finished runs, form by form.

    Raises:
        ValueError: for unsound settings, or if `out` holds a comparison with other settings.
        Interrupted: after Ctrl-C.
        RuntimeError: if runs failed; the others are written.
        ImportError: for `ray` without Ray.
    """
    out, console = Path(out), console or Console()
    _check_folder(settings, out)
    side_by_side = workers > 1 or ray is not None
    here = data is not None or not side_by_side
    data = data or load_settings_data(settings.train)
    forms = settings.forms(data.vocab_size, data.context)
    _check_data(data, out)
    for form in forms:
        check_memory(form.to_decoder_config(data.vocab_size, data.context))
    prepare(settings, out)
    console.print(f"[bold]data[/bold] {escape(data.description)}")
    if settings.match == "seconds":
        forms = at_equal_seconds(forms, data, out, console)
    longer = [dataclasses.replace(forms[0], steps=n) for n in settings.baseline_steps]
    times = _timetable(settings, forms, longer, out, console, workers)
    times.announce([*forms, *longer], data)
    runs = _Runs(out / "runs", data if here else settings.train, console, times, workers, ray)
    losses: Losses = {}
    if settings.lr_sweep:
        losses = _swept(settings, forms, out, runs)
        rates = best_of(losses)
        if note := edge_note(losses, settings.lr_sweep):
            console.print(note, style="yellow", highlight=False)
        forms = [dataclasses.replace(f, lr=rates[form_name(f)]) for f in forms if form_name(f) in rates]
    results, baseline = _Kept(forms, settings.seeds), _Kept([], 0)
    if forms and form_name(forms[0]) == settings.first_form:
        rate = forms[0].lr
        longer = [dataclasses.replace(run, lr=rate) for run in longer]
        baseline = _Kept(longer, settings.seeds, named_by_steps=True)

    def write(name: str, result: RunResult) -> None:
        for kept in (results, baseline):
            kept.take(name, result)
        _write(results.finished, baseline.finished, settings, data, out, losses, side_by_side)

    # Seed by seed: what is there after a stop compares every form.
    for seed in range(settings.seeds):
        runs.plan(results.of_seed(seed) | baseline.of_seed(seed))
    runs.run(write)
    if results.finished:
        _show(results.finished, baseline.finished, settings, data, console, side_by_side)
    if failures := runs.failures:
        raise RuntimeError(
            f"{len(failures)} of {runs.tried} runs failed ({'; '.join(failures)}); the others "
            f"are in {out}. Run the same command again to try the failed ones again"
        )
    return results.finished


def prepare(settings: CompareSettings, out: Path) -> None:
    """Make the folder of a comparison, or check that it holds this one; `compare` raises as this does."""
    _check_folder(settings, out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "compare.json", json.dumps(_plain(settings), indent=2) + "\n")


class _Kept:
    """Runs of some forms, seed by seed, and what is there of them."""

    def __init__(self, forms: Sequence[TrainSettings], seeds: int, named_by_steps: bool = False) -> None:
        self._runs = {
            run_name(s) + (f"-steps{s.steps}" if named_by_steps else ""): s
            for s in (dataclasses.replace(f, seed=seed) for f in forms for seed in range(seeds))
        }
        self._results: dict[str, RunResult] = {}

    def of_seed(self, seed: int) -> dict[str, TrainSettings]:
        """The runs with this seed, by name."""
        return {name: s for name, s in self._runs.items() if s.seed == seed}

    def take(self, name: str, result: RunResult) -> None:
        """Keep the result, if it is of these."""
        if name in self._runs:
            self._results[name] = result

    @property
    def finished(self) -> list[RunResult]:
        """What is there, form by form."""
        return [self._results[name] for name in self._runs if name in self._results]


class _Runs:
    """Runs in one folder, each with one line about it."""

    def __init__(
        self,
        folder: Path,
        data: Data | TrainSettings,
        console: Console,
        times: Timetable,
        workers: int,
        ray: str | None,
    ) -> None:
        self.folder, self.data, self.console, self.times = folder, data, console, times
        self.how: dict[str, Any] = {"workers": workers, "ray": ray}
        self.failures: list[str] = []
        self.tried = 0
        """Runs so far."""
        self._planned: dict[str, TrainSettings] = {}

    def plan(self, runs: dict[str, TrainSettings]) -> None:
        """Some more, by name."""
        self._planned |= runs

    def run(self, write: Callable[[str, RunResult], None]) -> None:
        """Train what is planned, or take what is there; `write` gets each. A failure is noted, not raised."""
        planned, self._planned = self._planned, {}
        self.tried += len(planned)
        titles = self.times.titles(list(planned.values()))
        runs = [
            Run(s, self.folder / name, title, self.data)
            for (name, s), title in zip(planned.items(), titles, strict=True)
        ]

        def done(run: Run, outcome: Outcome) -> None:
            if outcome.result is None:
                self.failures.append(f"{run.folder.name}: {outcome.reason}")
                self.console.print(f"[red]failed[/red] {escape(self.failures[-1])}", highlight=False)
                self.times.next(run.settings, failed=True)
                return
            write(run.folder.name, outcome.result)
            self.times.finished(run.title, run.settings, outcome.result, outcome.seconds)

        run_all(runs, self.console, done, **self.how)


def run_name(settings: TrainSettings) -> str:
    """The name of the folder of a run."""
    name = f"{settings.attention}-{settings.score}-seed{settings.seed}"
    return name if settings.lr == TrainSettings().lr else f"{name}-lr{settings.lr:g}"


def _timetable(
    settings: CompareSettings,
    forms: Sequence[TrainSettings],
    longer: Sequence[TrainSettings],
    out: Path,
    console: Console,
    workers: int,
) -> Timetable:
    each = settings.seeds + len(settings.lr_sweep)
    planned = {form_name(f): each for f in forms} | {longer_name(f): settings.seeds for f in longer}

    def there(form: TrainSettings) -> list[str]:
        found = (out / "runs").glob(f"{form.attention}-{form.score}-seed*/{RESULT}")
        return [path.parent.name for path in found]

    finished = {form_name(f): sum("-steps" not in name for name in there(f)) for f in forms}
    finished |= {longer_name(f): sum(name.endswith(f"-steps{f.steps}") for name in there(f)) for f in longer}
    return Timetable(planned, finished, console, workers)


def _swept(settings: CompareSettings, forms: Sequence[TrainSettings], out: Path, runs: _Runs) -> Losses:
    """The loss of each form at each rate; nothing of runs that failed."""
    tries = {
        run_name(s): s
        for s in (dataclasses.replace(f, lr=lr, seed=SWEEP_SEED) for f in forms for lr in settings.lr_sweep)
    }
    found: dict[str, float] = {}

    def losses() -> dict[str, dict[float, float]]:
        """In the order of the forms and rates, whichever run was over first."""
        of_form: dict[str, dict[float, float]] = {}
        for name, s in tries.items():
            if name in found:
                of_form.setdefault(form_name(s), {})[s.lr] = found[name]
        return of_form

    def write(name: str, result: RunResult) -> None:
        found[name] = result.val_loss
        write_sweep(out, losses())

    runs.plan(tries)
    runs.run(write)
    return losses()


def _check_folder(settings: CompareSettings, out: Path) -> None:
    """Raise if `out` cannot hold this comparison."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, expected a folder; use another --out")
    path, now = out / "compare.json", _plain(settings)
    if path.exists():
        before = _read(path)
        grows = {"attention", "score", "seeds"}  # more forms or seeds may join a comparison
        changed = [k for k in now if k not in grows and before.get(k) != now[k]]
        if changed:
            raise ValueError(
                f"{out} holds a comparison with other settings ({_differences(before, now, changed)}); repeat "
                f"those or use another --out"
            )
        if settings.match != "none" and before["attention"][0] != now["attention"][0]:
            raise ValueError(f"{out} matched its forms to {before['attention'][0]}; keep it first")
    elif out.exists() and holds_something(out):
        raise FileExistsError(f"{out} is not empty and holds no comparison; use another --out")


def _check_data(data: Data, out: Path) -> None:
    """Raise if there are runs on other data of the same name."""
    digest = data.digest()
    for path in (out / "results.jsonl", out / "baseline.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            if json.loads(line).get("data_digest") not in (None, digest):
                raise ValueError(f"{data.name} has changed since the runs in {out}; use another --out")


def _read(path: Path) -> dict[str, Any]:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not {"attention", "score", "train"} <= set(before):
            raise ValueError("settings are missing")
        if missing := missing_settings(before["train"]):
            raise ValueError(f"no {', '.join(missing)}")
        # a setting that is newer than the folder had its default
        before["train"] = {**_plain(CompareSettings())["train"], **before["train"]}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); use another --out") from None
    return before


def _differences(before: dict[str, Any], now: dict[str, Any], changed: list[str]) -> str:
    parts = []
    for key in changed:
        if key == "train":
            old, new = before.get("train", {}), now["train"]
            parts += [f"{k} was {old.get(k)!r}, is {new[k]!r}" for k in new if old.get(k) != new[k]]
        else:
            parts.append(f"{key} was {before.get(key)!r}, is {now[key]!r}")
    return "; ".join(parts)


def _plain(settings: CompareSettings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _write(
    results: list[RunResult],
    longer: list[RunResult],
    settings: CompareSettings,
    data: Data,
    out: Path,
    losses: Losses,
    side_by_side: bool,
) -> None:
    """Everything but the models, anew after every run, so that a stop loses nothing."""
    for name, some in (("results.jsonl", results), ("baseline.jsonl", longer)):
        if some:
            write_text(out / name, "".join(json.dumps(r.to_dict()) + "\n" for r in some))
    if not results:
        return
    summaries = summarise(results)
    worth = multipliers(summaries, longer)
    equal_lr = "the best of a sweep, per form" if settings.lr_sweep else "equal for all forms"
    t = settings.train
    fewest, most = (of(s.steps for s in summaries) for of in (min, max))
    lengths = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    parts = [
        f"# {' · '.join(s.name for s in summaries)}",
        f"{data.description}. {lengths} steps of {t.batch_size} x {data.context} tokens; held equal: "
        f"{HELD_EQUAL[settings.match]}; learning rate: {equal_lr}. All forms start from the same logit scale "
        f"(standard deviation {t.init_logit_std:g}), see the same rows in the same order, and share their seeds.",
        markdown_table(summaries),
        noise_note(summaries),
        sweep_markdown(losses, settings.lr_sweep) if losses else one_rate_note(summaries),
        SIDE_BY_SIDE if side_by_side else "",
        *([] if worth is None else [f"**Compute multiplier**: {worth.note}", worth.markdown]),
        "![curves](compare.png)",
    ]
    write_text(out / "summary.md", "\n\n".join(part for part in parts if part) + "\n")
    plot_curves(
        summaries,
        out / "compare.png",
        f"Validation loss on {data.name}",
        f"width {t.d_model}, {t.n_layers} layers, context {data.context}; {_seeds(settings.seeds)}",
    )


def _show(
    results: list[RunResult],
    longer: list[RunResult],
    settings: CompareSettings,
    data: Data,
    console: Console,
    side_by_side: bool,
) -> None:
    """The tables of a comparison, as far as they fit on the screen."""
    summaries = summarise(results)
    title = f"{data.name}: validation loss in nats per token"
    if settings.match != "none":
        title += f"; held equal: {HELD_EQUAL[settings.match]}"
    keep = [{"params": "parameters", "flops": "FLOPs/token"}.get(settings.match, "")]
    keep += ["lr"] if len({s.runs[0].lr for s in summaries}) > 1 else []
    console.print(rich_table(summaries, title, console.width, keep))
    notes = [noise_note(summaries), "" if settings.lr_sweep else one_rate_note(summaries)]
    notes.append(SIDE_BY_SIDE if side_by_side else "")
    for note in filter(None, notes):
        console.print(note.replace("**", ""), style="dim")
    if (worth := multipliers(summaries, longer)) is not None:
        console.print(worth.rich(console.width))
        console.print(worth.note, style="dim")


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"mean of {n} seeds, band: their range"

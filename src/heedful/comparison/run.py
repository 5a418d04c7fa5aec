"""Running a comparison: every form, every seed, and what it leaves in its folder."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful.comparison.plot import plot_curves
from heedful.comparison.settings import CompareSettings
from heedful.comparison.table import markdown_table, noise_note, rich_table, summarise
from heedful.comparison.timetable import Timetable, form_name
from heedful.data import Data
from heedful.errors import Interrupted
from heedful.files import write_text
from heedful.training import RunResult, TrainSettings, train
from heedful.training.run import RESULT, load_settings_data
from heedful.training.settings import SETTINGS


def compare(
    settings: CompareSettings, out: str | Path, *, console: Console | None = None, data: Data | None = None
) -> list[RunResult]:
    """Train every form with every seed and write the comparison.

    `out` gets `results.jsonl` (a row per run), `summary.md`, `compare.png`, the models under `runs/`, and
    `sweep.jsonl` after a learning-rate sweep. Called again with the same settings it goes on where it
    stopped. A run that fails is reported and does not lose the others; calling again tries it again.

    Args:
        settings: what to compare.
        out: the folder; made if missing.
        console: where to show progress and the table.
        data: loaded data; default: what the settings name.

    Returns:
        The finished runs, form by form.

    Raises:
        ValueError: for unsound settings, or if `out` holds a comparison with other settings.
        Interrupted: after Ctrl-C.
        RuntimeError: if runs failed; the others are written.
    """
    out, console = Path(out), console or Console()
    _check_folder(settings, out)
    data = data or load_settings_data(settings.train)
    forms = settings.forms(data.vocab_size, data.context)
    prepare(settings, out)
    console.print(f"[bold]data[/bold] {data.description}")
    runs = _Runs(out / "runs", data, console, _timetable(settings, forms, out, console))
    runs.times.announce(forms, data)
    results: list[RunResult] = []
    for form in forms:
        lr = form.lr
        if settings.lr_sweep:
            best = _sweep(form, settings.lr_sweep, out, runs)
            if best is None:
                continue
            lr = best
        for seed in range(settings.seeds):
            result = runs.run(dataclasses.replace(form, lr=lr, seed=seed))
            if result is not None:
                results.append(result)
                _write(results, settings, data, out)
    if results:
        summaries = summarise(results)
        title = f"{data.name}: validation loss in nats per token"
        console.print(rich_table(summaries, title, console.width))
        console.print(noise_note(summaries).replace("**", ""), style="dim")
    if failures := runs.failures:
        raise RuntimeError(
            f"{len(failures)} of {len(failures) + len(results)} runs failed ({'; '.join(failures)}); the others "
            f"are in {out}. Run the same command again to try the failed ones again"
        )
    return results


def prepare(settings: CompareSettings, out: Path) -> None:
    """Make the folder of a comparison, or check that it holds this one; `compare` raises as this does."""
    _check_folder(settings, out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "compare.json", json.dumps(_plain(settings), indent=2) + "\n")


class _Runs:
    """Runs in one folder, each with one line about it."""

    def __init__(self, folder: Path, data: Data, console: Console, times: Timetable) -> None:
        self.folder, self.data, self.console, self.times = folder, data, console, times
        self.failures: list[str] = []
        self.seen: set[Path] = set()

    def run(self, settings: TrainSettings) -> RunResult | None:
        """One run, or what is left of it; a failure is noted, not raised."""
        out = self.folder / run_name(settings)
        known, finished = out in self.seen, (out / RESULT).exists()
        self.seen.add(out)
        began = time.perf_counter()
        try:
            result = train(
                settings,
                out,
                resume=(out / SETTINGS).exists(),
                data=self.data,
                console=self.console,
                title=self.times.title(settings),
            )
        except Interrupted:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.failures.append(f"{out.name}: {reason}")
            self.console.print(f"[red]failed[/red] {self.failures[-1]}", highlight=False)
            self.times.next(settings, failed=True)
            return None
        if not known:  # the best run of a sweep is also the first of its form
            self.times.finished(settings, result, None if finished else time.perf_counter() - began)
        return result


def run_name(settings: TrainSettings) -> str:
    """The name of the folder of a run."""
    name = f"{settings.attention}-{settings.score}-seed{settings.seed}"
    return name if settings.lr == TrainSettings().lr else f"{name}-lr{settings.lr:g}"


def _timetable(
    settings: CompareSettings, forms: Sequence[TrainSettings], out: Path, console: Console
) -> Timetable:
    """A sweep's best run is the first of its form, not one more."""
    each = settings.seeds + max(len(settings.lr_sweep) - 1, 0)
    finished = {
        form_name(f): len(list((out / "runs").glob(f"{f.attention}-{f.score}-seed*/{RESULT}"))) for f in forms
    }
    return Timetable({form_name(f): each for f in forms}, finished, console)


def _sweep(form: TrainSettings, rates: Sequence[float], out: Path, runs: _Runs) -> float | None:
    """The learning rate with the lowest validation loss at the first seed."""
    tried: list[tuple[float, float]] = []
    for lr in rates:
        result = runs.run(dataclasses.replace(form, lr=lr, seed=0))
        if result is not None:
            tried.append((result.val_loss, lr))
            _append_sweep(out / "sweep.jsonl", form, lr, result.val_loss)
    return min(tried)[1] if tried else None


def _append_sweep(path: Path, form: TrainSettings, lr: float, loss: float) -> None:
    row = {"attention": form.attention, "score": form.score, "lr": lr, "val_loss": loss}
    line = json.dumps(row)
    if not path.exists() or line not in path.read_text(encoding="utf-8").splitlines():
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


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
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no comparison; use another --out")


def _read(path: Path) -> dict[str, Any]:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not {"attention", "score", "train"} <= set(before):
            raise ValueError("settings are missing")
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


def _write(results: list[RunResult], settings: CompareSettings, data: Data, out: Path) -> None:
    """Everything but the models, anew after every run, so that a stop loses nothing."""
    lines = "".join(json.dumps(r.to_dict()) + "\n" for r in results)
    write_text(out / "results.jsonl", lines)
    summaries = summarise(results)
    held = {"none": "nothing but depth and width", "params": "parameters", "flops": "training FLOPs"}
    equal_lr = "the best of a sweep, per form" if settings.lr_sweep else "equal for all forms"
    t = settings.train
    parts = [
        f"# {' · '.join(s.name for s in summaries)}",
        f"{data.description}. {t.steps} steps of {t.batch_size} x {data.context} tokens; held equal: "
        f"{held[settings.match]}; learning rate: {equal_lr}. All forms start from the same logit scale "
        f"(standard deviation {t.init_logit_std:g}), see the same rows in the same order, and share their seeds.",
        markdown_table(summaries),
        noise_note(summaries),
        "![curves](compare.png)",
    ]
    write_text(out / "summary.md", "\n\n".join(parts) + "\n")
    plot_curves(
        summaries,
        out / "compare.png",
        f"Validation loss on {data.name}",
        f"width {t.d_model}, {t.n_layers} layers, context {data.context}; {_seeds(settings.seeds)}",
    )


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"mean of {n} seeds, band: their range"

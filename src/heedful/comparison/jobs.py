"""The runs of a comparison, one after the other, side by side, or on a cluster."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from heedful.data import Data
from heedful.errors import Interrupted
from heedful.training import RunResult, TrainSettings, train
from heedful.training.run import RESULT, load_settings_data
from heedful.training.settings import SETTINGS
from heedful.training.workers import side_by_side

OF_DATA = ("data", "task_options", "val_data", "text_column", "tokenizer", "vocab_size", "context", "seed")
"""Settings that say which data it is; the seed, that of a comparison's or a study's first run, draws a task."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    result: RunResult | None
    """None: it failed."""
    seconds: float | None
    """What it took; None: it was finished before."""
    reason: str = ""
    """Why it failed."""


@dataclass(frozen=True)
class Run:
    """One model to train in a folder, or to go on with; handed to another process as it is."""

    settings: TrainSettings
    folder: Path
    title: str
    data: Data | TrainSettings
    """What to train on; or the settings that name it, where each process shall load it for itself."""

    @property
    def steps(self) -> int:
        """Steps of training."""
        return self.settings.steps

    def run(self, console: Console, callbacks: Sequence[TrainerCallback] = ()) -> Outcome:
        """Train; a failure is an outcome, a stop is raised."""
        finished, began = (self.folder / RESULT).exists(), time.perf_counter()
        try:
            result = train(
                self.settings,
                self.folder,
                resume=(self.folder / SETTINGS).exists(),
                data=None if finished else _loaded(self.data),
                console=console,
                title=self.title,
                callbacks=callbacks,
            )
        except Interrupted:
            raise
        except Exception as error:
            return Outcome(None, None, str(error).splitlines()[0] if str(error) else type(error).__name__)
        return Outcome(result, None if finished else time.perf_counter() - began)


def run_all(
    runs: Sequence[Run],
    console: Console,
    done: Callable[[Run, Outcome], None],
    *,
    workers: int = 1,
    ray: str | None = None,
) -> list[RunResult | None]:
    """Run them all; the results in order, None where a run failed.

    Args:
        runs: what to train.
        console: where progress is shown.
        done: called in this process as each ends, in the order in which they do.
        workers: how many at a time, each with its share of the cores.
        ray: a Ray cluster to run them on instead: its address, "auto", or "local" for one on this machine.

    Raises:
        Interrupted: after Ctrl-C; every run that was training has saved a checkpoint.
    """
    outcomes: list[Outcome | None] = [None] * len(runs)

    def ended(number: int, outcome: Outcome) -> None:
        outcomes[number] = outcome
        done(runs[number], outcome)

    if ray is not None:
        from heedful.training.on_ray import on_ray

        on_ray(runs, console, ended, ray, workers)
    else:
        side_by_side(runs, console, workers, done=ended)
    return [None if outcome is None else outcome.result for outcome in outcomes]


def _loaded(data: Data | TrainSettings) -> Data:
    """The data itself; the runs of one process share it."""
    return data if isinstance(data, Data) else _load(data_key(data.to_dict()))


def data_key(settings: Mapping[str, Any]) -> str:
    """What of the settings of a run says on which data it trains."""
    return json.dumps({name: settings.get(name) for name in OF_DATA}, sort_keys=True)


@lru_cache(maxsize=2)
def _load(settings: str) -> Data:
    return load_settings_data(TrainSettings(**json.loads(settings)))

"""Jobs side by side: what is said where nothing had begun."""

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerCallback

from heedful.training import Interrupted
from heedful.training.workers import side_by_side


@dataclass(frozen=True)
class Touch:
    """A job that leaves a file."""

    path: Path
    title: str = "touch"
    steps: int = 1

    def run(self, console: Console, callbacks: Sequence[TrainerCallback]) -> str:
        self.path.touch()
        return self.path.name


@pytest.mark.slow
def test_jobs_and_ctrl_c_before_they_begin(tmp_path: Path):
    jobs = [Touch(tmp_path / name) for name in "abc"]
    assert side_by_side(jobs, Console(quiet=True), 2) == ["a", "b", "c"]
    for job in jobs:
        job.path.unlink()
    press = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))  # the processes take longer to start
    press.start()
    with pytest.raises(Interrupted, match=r"^stopped, before any model trained$"):
        side_by_side(jobs, Console(quiet=True), 2)
    assert not list(tmp_path.iterdir())

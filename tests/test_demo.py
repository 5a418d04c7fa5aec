"""The demo: models that train side by side, one loss per model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import heedful.demo as demo_module
from heedful.demo.jobs import TextModel, text_data
from heedful.evaluation import evaluate
from heedful.hf.load import load_model
from heedful.plotting import COLORS, colors
from heedful.training import TrainSettings
from heedful.training.workers import side_by_side

TINY: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "batch_size": 4, "steps": 3}


def text_settings(text_file: Path, **options: Any) -> TrainSettings:
    return TrainSettings(**TINY, data=str(text_file), tokenizer="bytes", context=32, evaluations=1, **options)


def test_a_model_has_one_loss(text_file: Path, tmp_path: Path):
    """At the end of its curve, in the table, and with a full cache."""
    settings = text_settings(text_file)
    data = text_data(settings)
    job = TextModel(settings, tmp_path / "run", data, (8,), "streaming")
    result, held = job.run(Console(quiet=True), ())
    assert held[0].policy is None
    assert held[0].loss == pytest.approx(result.val_loss, abs=1e-5)
    assert result.curve[-1][1] == pytest.approx(result.val_loss, abs=1e-5)
    assert held[0].tokens == evaluate(load_model(tmp_path / "run"), data.validation).tokens


@dataclass(frozen=True)
class Fails:
    """A job that cannot be done."""

    title: str = "fails"
    steps: int = 1

    def run(self, console: Console, callbacks: Sequence[Any]) -> None:
        raise OSError("no room")


@pytest.mark.exhaustive
def test_models_that_train_side_by_side_are_those_that_train_alone(text_file: Path, tmp_path: Path):
    data = text_data(text_settings(text_file))

    def losses(out: Path, workers: int) -> list[float]:
        jobs = [
            TextModel(text_settings(text_file, score=s), out / s, data, (), None) for s in demo_module.SCORES
        ]
        return [result.val_loss for result, _ in side_by_side(jobs, Console(quiet=True), workers)]

    assert losses(tmp_path / "two", 2) == losses(tmp_path / "one", 1)


@pytest.mark.slow
def test_what_a_worker_raises_is_raised():
    with pytest.raises(OSError, match="no room"):
        side_by_side([Fails(), Fails()], Console(quiet=True), workers=2)


@pytest.mark.exhaustive
def test_ctrl_c_saves_what_trains_and_the_same_call_goes_on(text_file: Path, tmp_path: Path):
    code = f"""if __name__ == "__main__":
        from dataclasses import replace
        import heedful.demo as demo_module
        tiny = dict(d_model=16, n_layers=1, n_heads=2, batch_size=4, steps=400)
        demo_module.TEXT = replace(demo_module.TEXT, **tiny, data={str(text_file)!r}, tokenizer="bytes", context=32)
        demo_module.TASK = replace(demo_module.TASK, **tiny)
        demo_module.demo({str(tmp_path / "out")!r}, workers=2)
    """
    (tmp_path / "run.py").write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("runs/*/log.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert "Interrupted: stopped, with a checkpoint" in said
    assert list((tmp_path / "out").glob("runs/*/checkpoints/checkpoint-*/model.safetensors"))
    assert not (tmp_path / "out" / "summary.md").exists()


def test_every_form_has_its_own_colour():
    assert len(set(COLORS.values())) == len(COLORS)
    assert colors(["mha x softmax", "mine", "mha x selective", "mine too"])[::2] == [
        COLORS["softmax"],
        COLORS["selective"],
    ]
    ours = colors(["mine", "sas x softmax", "mine too"])
    assert ours[1] == COLORS["sas x softmax"]
    assert len(set(ours)) == 3

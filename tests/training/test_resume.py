"""A run that was stopped goes on as if it had not been, or says why it cannot."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import heedful.training.run as run_module
from heedful.files import Locked, folder_locked
from heedful.hf.load import load_model
from heedful.training import RunResult, TrainSettings
from heedful.training.checkpoint import last_checkpoint

Settings = Callable[..., TrainSettings]
Train = Callable[..., RunResult]
Interrupt = Callable[..., None]


@pytest.mark.parametrize(
    ("attention", "score", "dropout", "step"),
    [
        pytest.param("mha", "softmax", 0.0, 3, marks=pytest.mark.slow),
        ("mha", "softmax", 0.0, 12),  # in the second epoch
        ("sas", "selective", 0.0, 3),
        pytest.param("sas", "selective", 0.0, 12, marks=pytest.mark.slow),
        ("mha", "softmax", 0.2, 3),
        pytest.param("mha", "softmax", 0.2, 12, marks=pytest.mark.slow),
    ],
)
def test_resume_continues_exactly(
    settings: Settings,
    quiet_train: Train,
    interrupt: Interrupt,
    tmp_path: Path,
    attention: str,
    score: str,
    dropout: float,
    step: int,
):
    s = settings(attention=attention, score=score, dropout=dropout, weight_decay=0.1)
    whole = quiet_train(s, tmp_path / "whole")
    interrupt(s, tmp_path / "parts", step)
    assert not (tmp_path / "parts" / "result.json").exists()
    torch.randn(7)  # the random state comes from the checkpoint
    resumed = quiet_train(s, tmp_path / "parts", resume=True)

    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert resumed.curve == whole.curve
    timing = ("seconds_per_step", "tokens_per_second")
    assert {k: v for k, v in resumed.to_dict().items() if k not in timing} == {
        k: v for k, v in whole.to_dict().items() if k not in timing
    }
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_interrupted_folder(settings: Settings, interrupt: Interrupt, tmp_path: Path):
    interrupt(settings(), tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"train.json", "checkpoints", "log.jsonl"}
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-12").is_dir()
    with pytest.raises(FileNotFoundError, match="training has not finished: heedful train --resume --out"):
        load_model(tmp_path / "run")


def test_stopped_after_the_last_step(
    settings: Settings, quiet_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped in the final evaluation: no step is taken twice."""
    whole = quiet_train(settings(), tmp_path / "whole")

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.HeedfulForCausalLM, "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            quiet_train(settings(checkpoints=16), tmp_path / "run")
    resumed = quiet_train(settings(checkpoints=16), tmp_path / "run", resume=True)
    assert (resumed.val_loss, resumed.curve) == (whole.val_loss, whole.curve)
    assert resumed.seconds_per_step > 0


def test_killed_before_the_first_checkpoint(settings: Settings, quiet_train: Train, tmp_path: Path):
    whole = quiet_train(settings(), tmp_path / "whole")
    (tmp_path / "run").mkdir()
    settings().save(tmp_path / "run" / "train.json")
    assert quiet_train(settings(), tmp_path / "run", resume=True).val_loss == whole.val_loss


def test_killed_before_its_settings_were_written(settings: Settings, quiet_train: Train, tmp_path: Path):
    """What is there of them is no run: the same command begins it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.json.123.new").write_text('{"data"')
    assert quiet_train(settings(), tmp_path / "run").val_loss > 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.new").touch()
    with pytest.raises(FileExistsError, match="other is not empty"):
        quiet_train(settings(), tmp_path / "other")


def test_finished_run_is_returned(settings: Settings, quiet_train: Train, tmp_path: Path):
    done = quiet_train(settings(), tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    again = quiet_train(settings(), tmp_path / "run", resume=True)
    assert again.val_loss == done.val_loss
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_killed_before_its_checkpoints_were_gone(
    settings: Settings, quiet_train: Train, stopped: Path, monkeypatch: pytest.MonkeyPatch
):
    """A finished run needs none, and nobody else would remove them."""
    with monkeypatch.context() as patch:
        patch.setattr(run_module.shutil, "rmtree", lambda *args, **kwargs: None)
        done = quiet_train(settings(), stopped, resume=True)
    assert (stopped / "checkpoints").exists()
    assert quiet_train(settings(), stopped, resume=True).val_loss == done.val_loss
    assert not (stopped / "checkpoints").exists()


def test_settings_must_agree(settings: Settings, quiet_train: Train, interrupt: Interrupt, tmp_path: Path):
    interrupt(settings(), tmp_path / "run")
    other = dataclasses.replace(settings(), lr=0.1, score="selective")
    message = (
        r"score was 'softmax' and is 'selective'; lr was 0\.01 and is 0\.1; leave those out or use another"
    )
    with pytest.raises(ValueError, match=message):
        quiet_train(other, tmp_path / "run", resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        quiet_train(settings(), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def stopped(settings: Settings, interrupt: Interrupt, tmp_path: Path) -> Path:
    """A run with the checkpoints 8 and 10."""
    interrupt(settings(), tmp_path / "run", 10)
    return tmp_path / "run"


PARTS = [
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
]


def test_corrupt_checkpoint(settings: Settings, quiet_train: Train, stopped: Path, tmp_path: Path):
    for part in PARTS:
        for damage in (b"", b"\x00garbage" * 9, None):
            run = tmp_path / "copy"
            shutil.copytree(stopped, run)
            file = run / "checkpoints" / "checkpoint-10" / part
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage is None else damage)
            message = (
                r"the checkpoint .*checkpoint-10 cannot be read \(.*\); delete that folder to resume from the"
            )
            with pytest.raises(ValueError, match=message) as error:
                quiet_train(settings(), run, resume=True)
            assert "\n" not in str(error.value)
            assert not (run / "result.json").exists()
            shutil.rmtree(run)


def test_a_flipped_bit_in_a_checkpoint(settings: Settings, quiet_train: Train, stopped: Path, tmp_path: Path):
    """Weights with another bit can be read, and would be trained on."""
    for part in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        run = tmp_path / "copy"
        shutil.copytree(stopped, run)
        file = run / "checkpoints" / "checkpoint-10" / part
        content = bytearray(file.read_bytes())
        content[-9 if part.endswith("json") else len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"checkpoint-10 cannot be read \({part} is not what was written"
        ):
            quiet_train(settings(), run, resume=True)
        shutil.rmtree(run)
    (stopped / "checkpoints" / "checkpoint-10" / "checksums.json").unlink()  # as early versions left it
    assert quiet_train(settings(), stopped, resume=True).val_loss > 0


def test_a_folder_that_is_no_checkpoint(settings: Settings, quiet_train: Train, stopped: Path):
    """Digits of other scripts, and names that are no number."""
    for name in ("checkpoint-³", "checkpoint-１２", "checkpoint-last", "checkpoint-"):
        shutil.copytree(stopped / "checkpoints" / "checkpoint-8", stopped / "checkpoints" / name)
    assert last_checkpoint(stopped / "checkpoints") == str(stopped / "checkpoints" / "checkpoint-10")
    assert quiet_train(settings(), stopped, resume=True).val_loss > 0


def test_the_loss_of_a_part_is_not_that_of_the_run(settings: Settings, quiet_train: Train, stopped: Path):
    quiet_train(settings(), stopped, resume=True)
    assert '"train_loss"' not in (stopped / "log.jsonl").read_text()


def test_one_process_at_a_time(settings: Settings, quiet_train: Train, stopped: Path):
    files = sorted(stopped.rglob("*"))
    with (
        folder_locked(stopped),
        pytest.raises(Locked, match=r"another process works in .*run; wait for it, or"),
    ):
        quiet_train(settings(), stopped, resume=True)
    assert sorted(stopped.rglob("*")) == files
    quiet_train(settings(), stopped, resume=True)


@pytest.mark.parametrize("damage", ["", "{", "{}", "[]", "null"])
def test_a_damaged_result(settings: Settings, quiet_train: Train, stopped: Path, damage: str):
    (stopped / "result.json").write_text(damage)
    with pytest.raises(ValueError, match=r"result\.json is damaged \(.*\); delete it and resume"):
        quiet_train(settings(), stopped, resume=True)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("instead", ["nothing", "a folder"])
def test_checkpoint_that_was_not_written_to_its_end(
    settings: Settings, quiet_train: Train, stopped: Path, tmp_path: Path, part: str, instead: str
):
    """Killed while saving: the checkpoint before counts, and nothing starts afresh in silence."""
    file = stopped / "checkpoints" / "checkpoint-10" / part
    file.unlink()
    if instead == "a folder":
        file.mkdir()
    resumed = quiet_train(settings(), stopped, resume=True)
    whole = quiet_train(settings(), tmp_path / "whole")
    assert (resumed.val_loss, resumed.curve) == (whole.val_loss, whole.curve)

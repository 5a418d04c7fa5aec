"""`adapt` on a tiny model: what it changes, that it helps, that a stop loses nothing, and what it refuses."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.stock import save_stock_model
from transformers import AutoModelForCausalLM, TrainerCallback

import heedful
from heedful.adaptation import AdaptSettings, adapt
from heedful.adaptation import run as run_module
from heedful.attention.eviction import Eviction
from heedful.data.austen import load_austen
from heedful.errors import Interrupted
from heedful.files import Locked, folder_locked

QUICK: dict[str, Any] = {
    "context": 128,
    "kv_grace": 4,
    "kv_first": 2,
    "local_tokens": 128 * 24,
    "distill_tokens": 128 * 6,
    "checkpoints": 2,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(load_austen()[0][0][:24_000])
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Weights so large that whom it attends to matters."""
    return save_stock_model(tmp_path_factory.mktemp("stock"), [text.read_text()[:5000]], std=0.3)


@pytest.fixture
def convert(stock: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "out", **how: Any) -> Path:
        return heedful.convert(stock, tmp_path / name, **how)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("per", ["layer", pytest.param("kv_head", marks=pytest.mark.slow)])
def test_selectors_learn_and_nothing_else_changes(convert: Callable[..., Path], text: Path, per: str):
    folder = convert(per=per)
    before = weights(folder)
    config = json.loads((folder / "config.json").read_text())
    result = adapt(folder, AdaptSettings(data=str(text), **QUICK))
    after = weights(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".score." in name}
    assert result.kl < 0.9 * result.kl_before and result.kl == result.kl_after_local
    assert result.trained_parameters == sum(t.numel() for name, t in after.items() if ".score." in name)
    assert (result.held, result.context, result.local_tokens) == (32, 128, 128 * 24)
    eviction = Eviction(32, grace=4, first=2)
    config["heedful"]["eviction"] = json.loads(json.dumps(eviction.to_dict()))
    assert json.loads((folder / "config.json").read_text()) == config
    assert heedful.load(folder).model.saved_eviction() == eviction
    assert sorted(p.name for p in (folder / "adapt").iterdir()) == [
        "adapt.json",
        "data.sha256",
        "local-log.jsonl",
        "result.json",
    ]
    entries = [json.loads(line) for line in (folder / "adapt" / "local-log.jsonl").read_text().splitlines()]
    assert [e["eval_kl"] for e in entries if "eval_kl" in e][-1] == pytest.approx(result.kl)
    assert f"KL to the source | {result.kl:.4f}" in (folder / "README.md").read_text()


def test_lora_is_merged_and_goes_back(convert: Callable[..., Path], stock: Path, text: Path, tmp_path: Path):
    folder = convert()
    before = weights(folder)
    settings = AdaptSettings(data=str(text), lora=4, lora_lr=5e-3, **{**QUICK, "distill_tokens": 128 * 16})
    result = adapt(folder, settings)
    assert result.kl < 0.99 * result.kl_after_local
    after = weights(folder)
    changed = {
        name for name in before if not torch.equal(before[name], after[name]) and ".score." not in name
    }
    parts = "q_proj", "k_proj", "v_proj", "o_proj"
    projections = {name for name in before if any(part in name for part in parts)}
    assert changed == projections and len(projections) == 8
    heedful.convert(folder, tmp_path / "back", back=True)
    back = weights(tmp_path / "back")
    assert all(torch.equal(back[name], after[name]) for name in back) and back.keys() == weights(stock).keys()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_checkpoint_in_16_bits_stays_one(precision: str, stock: Path, text: Path, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(stock).bfloat16().save_pretrained(tmp_path / "stock")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stock / name, tmp_path / "stock" / name)
    folder = heedful.convert(tmp_path / "stock", tmp_path / "out")
    settings = AdaptSettings(data=str(text), lora=2, precision=precision, **QUICK)  # type: ignore[arg-type]
    result = adapt(folder, settings)
    assert result.kl < result.kl_before
    assert {t.dtype for t in weights(folder).values()} == {torch.bfloat16}
    model, _ = heedful.load(folder)
    assert model.dtype == torch.bfloat16
    model.generate(torch.arange(3, 60)[None], max_new_tokens=4)


def test_lora_alone_where_nobody_votes(convert: Callable[..., Path], text: Path):
    folder = convert(score="softmax")
    before = weights(folder)
    result = adapt(folder, AdaptSettings(data=str(text), lora=2, **{**QUICK, "distill_tokens": 128 * 2}))
    assert result.local_tokens == 0 and result.kl_after_local == result.kl_before
    after = weights(folder)
    assert sum(not torch.equal(t, after[name]) for name, t in before.items()) == 8  # q, k, v, o of two layers
    assert heedful.load(folder).model.saved_eviction() == Eviction(32, "streaming", grace=4, first=2)


class StopAt(TrainerCallback):
    """Ctrl-C, as it arrives in the middle of a step."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step:
            import signal

            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("stage", "step"), [("local", 9), pytest.param("distill", 3, marks=pytest.mark.slow)]
)
def test_a_stop_loses_nothing(
    stage: str, step: int, convert: Callable[..., Path], text: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = AdaptSettings(data=str(text), lora=2 if stage == "distill" else 0, **QUICK)
    whole, stopped = convert("whole"), convert("stopped")
    adapt(whole, settings)
    untouched = weights(stopped)
    with pytest.raises(Interrupted, match=f"stopped at step {step + 1} of"):
        adapt(stopped, settings, callbacks=[StopAt(stage, step)])
    assert all(torch.equal(t, untouched[name]) for name, t in weights(stopped).items())
    with pytest.raises(FileExistsError, match="holds an unfinished adaptation; --resume goes on"):
        adapt(stopped, settings)
    with pytest.raises(
        ValueError, match="a resumed adaptation keeps its settings, but kv_grace was 4 and is 9"
    ):
        adapt(stopped, AdaptSettings(**{**settings.to_dict(), "kv_grace": 9}), resume=True)
    result = adapt(stopped, AdaptSettings(), resume=True)
    for name, t in weights(whole).items():
        torch.testing.assert_close(weights(stopped)[name], t, rtol=0, atol=0)
    with pytest.raises(FileExistsError, match="holds a finished adaptation; delete"):
        adapt(stopped, settings)
    assert adapt(stopped, AdaptSettings(), resume=True) == result


def test_one_process_at_a_time(convert: Callable[..., Path], text: Path):
    folder = convert("held")
    files = sorted(folder.rglob("*"))
    with folder_locked(folder), pytest.raises(Locked, match=r"another process works in .*held; wait for it"):
        adapt(folder, AdaptSettings(data=str(text), **QUICK))
    assert sorted(folder.rglob("*")) == files


@pytest.mark.parametrize("where", ["rewrite", "replace"])
def test_a_stop_at_the_very_end_is_made_good(
    where: str, convert: Callable[..., Path], text: Path, monkeypatch: pytest.MonkeyPatch
):
    """LoRA is merged once, whenever the weights were being replaced."""
    settings = AdaptSettings(data=str(text), lora=2, lora_lr=5e-3, **{**QUICK, "local_tokens": 128})
    whole, stopped = convert("whole"), convert("stopped")
    result = adapt(whole, settings)

    def stop(*args: Any, **kwargs: Any) -> None:
        if where == "replace":
            rewrite(*args, **kwargs)
        raise KeyboardInterrupt

    rewrite = run_module.rewrite
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "rewrite", stop)
        with pytest.raises(KeyboardInterrupt):
            adapt(stopped, settings)
    again = adapt(stopped, AdaptSettings(), resume=True)
    for name, t in weights(whole).items():
        torch.testing.assert_close(weights(stopped)[name], t, rtol=0, atol=0)
    assert (again.kl_before, again.kl) == (result.kl_before, result.kl)
    assert (stopped / "README.md").read_text() == (whole / "README.md").read_text()


def test_killed_before_its_checkpoints_were_gone(
    convert: Callable[..., Path], text: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = convert()
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_clean", lambda place: None)
        result = adapt(folder, AdaptSettings(data=str(text), **{**QUICK, "local_tokens": 128}))
    place = folder / "adapt"
    assert (place / "final.safetensors").exists() and (place / "local").exists()
    assert adapt(folder, AdaptSettings(), resume=True) == result
    assert not (place / "final.safetensors").exists() and not (place / "local").exists()


def test_a_resumption_meets_other_data_and_damage(convert: Callable[..., Path], text: Path, tmp_path: Path):
    folder, own = convert(), tmp_path / "own.txt"
    own.write_text(text.read_text())
    settings = AdaptSettings(data=str(own), **QUICK)
    with pytest.raises(Interrupted):
        adapt(folder, settings, callbacks=[StopAt("local", 5)])
    own.write_text("hello world. " * 4000)
    with pytest.raises(ValueError, match="the data is not what this adaptation began with"):
        adapt(folder, AdaptSettings(), resume=True)
    own.write_text(text.read_text())
    (checkpoint,) = (folder / "adapt" / "local").glob("checkpoint-*")
    (checkpoint / "optimizer.pt").write_bytes(b"PK damaged")
    with pytest.raises(
        ValueError, match=f"{checkpoint.name} cannot be read .*; delete it to go on from the one"
    ):
        adapt(folder, AdaptSettings(), resume=True)


def test_what_cannot_be_adapted(convert: Callable[..., Path], stock: Path, text: Path, tmp_path: Path):
    settings = AdaptSettings(data=str(text), **QUICK)
    with pytest.raises(ValueError, match="expected a heedful one; `heedful convert` makes one of it"):
        adapt(stock, settings)
    for how in ({"score": "softmax"}, {"selector": "head"}, {"selector": "added", "subtract": True}):
        folder = convert("unfit", force=True, **how)
        with pytest.raises(ValueError, match="what learns are added selectors that only rank"):
            adapt(folder, settings)
    folder = convert()
    for change, message in (
        ({"context": 1024}, "--context must be 128 to 512, what the model can read, got 1,024"),
        ({"target_held": 0.04}, "nobody is left to choose"),
        ({"data": str(tmp_path / "none.txt")}, "there is no file or folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            adapt(folder, AdaptSettings(**{**settings.to_dict(), **change}))
        assert not (folder / "adapt").exists()
    with pytest.raises(FileNotFoundError, match="there is no adaptation to resume"):
        adapt(folder, settings, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 64}, "--context must be 128 or more"),
        ({"target_held": 1.5}, "--target-held must be greater than 0 and less than 1"),
        ({"lora": -1}, "--lora must be a whole number, 0 or more"),
        ({"batch_size": 0}, "--batch-size must be a whole number, 1 or more"),
        ({"lr": float("nan")}, "--lr must be greater than 0 and finite"),
        ({"data": "synthetic:variable-assignment"}, "a language model learns from text"),
        ({"trainer": {"nonsense": 1}}, "has no field nonsense"),
    ],
)
def test_unsound_settings(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        AdaptSettings(**options)


@pytest.mark.parametrize(("damage", "message"), [("{", "is damaged"), ("{}", "is damaged .no ")])
def test_damaged_settings(damage: str, message: str, convert: Callable[..., Path]):
    folder = convert()
    (folder / "adapt").mkdir()
    (folder / "adapt" / "adapt.json").write_text(damage)
    with pytest.raises(ValueError, match=message):
        adapt(folder, AdaptSettings(), resume=True)
    shutil.rmtree(folder / "adapt")


def test_says_that_there_is_little_text(convert: Callable[..., Path], tmp_path: Path):
    few = tmp_path / "few.txt"
    few.write_text(load_austen()[0][0][:450])
    said = Console(record=True, quiet=False, file=io.StringIO())
    adapt(convert(), AdaptSettings(data=str(few), **QUICK), console=said)
    assert re.search(r"tokens, which are read \d+ times;\s+more text", said.export_text())

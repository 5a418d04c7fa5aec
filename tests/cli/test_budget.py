"""`heedful budget`: from a trained run to budgets that `generate` keeps."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console

from heedful.evaluation.search import BudgetedLoss, BudgetSearch
from heedful.hf.generation import continue_text
from heedful.hf.load import load_model, load_tokenizer
from heedful.training import TrainSettings, train

Heedful = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]

CONTEXT = 32
SMALL: dict[str, Any] = {
    "tokenizer": "bytes",
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 2,
    "context": CONTEXT,
    "steps": 30,
    "lr": 1e-2,
    "evaluations": 1,
    "checkpoints": 1,
}


@pytest.fixture(scope="module")
def make_run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train a small run; once per name."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, **settings: Any) -> Path:
        if not (folder / name).exists():
            chosen = TrainSettings(**{**SMALL, "data": str(text_file), **settings})
            train(chosen, folder / name, console=Console(file=io.StringIO()))
        return folder / name

    return make


@pytest.fixture(scope="module")
def plain(make_run: Callable[..., Path]) -> Path:
    """Standard attention that has learned less than the selective run."""
    return make_run("plain", steps=15)


@pytest.fixture
def run(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A selective run of one's own, to write into."""
    return shutil.copytree(make_run("selective", score="selective"), tmp_path / "run")


def moves_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "budget.jsonl").read_text().splitlines()][1:]


def budgets_of(run: Path) -> list[int]:
    return json.loads((run / "config.json").read_text())["eviction"]["budget"]


def test_budgets_that_generate_keeps(heedful: Heedful, run: Path, contents: Contents):
    before = contents(run)
    done = heedful("budget", run, "--tolerance", "0.05")
    assert done.code == 0, done.err
    budgets = budgets_of(run)
    assert all(2 <= b <= CONTEXT for b in budgets)
    assert sum(budgets) < 2 * CONTEXT

    after = contents(run)
    assert set(after) - set(before) == {"budget.jsonl", "budget.png"}
    assert {n: t for n, t in before.items() if n != "config.json"}.items() <= after.items()
    config = {**json.loads(after["config.json"]), "eviction": None}
    assert json.dumps(config, indent=2) + "\n" == before["config.json"].decode()

    replayed = [CONTEXT, CONTEXT]
    for move in moves_of(run):
        if move["accepted"]:
            replayed[move["layer"]] = move["budget"]
    assert replayed == budgets
    assert "4 rows of 32 tokens to search on, 4 to report on" in done.err
    assert "its own full cache + 0.05" in done.err
    assert f"{2 * CONTEXT / sum(budgets):.2f}x fewer tokens" in done.out
    for word in (
        "full cache",
        "budgets",
        "bytes than its full cache",
        "config.json (eviction",
        "budget.png",
    ):
        assert word in done.out
    assert matplotlib.image.imread(run / "budget.png").std() > 0.01

    _, cache = continue_text(load_model(run), load_tokenizer(run), "the cat sat on", max_new_tokens=40)
    assert cache.seen > CONTEXT
    assert all(kept <= budget for kept, budget in zip(cache.kept, budgets, strict=True))
    assert max(cache.kept) > 1


def test_a_finished_search_is_not_repeated(heedful: Heedful, run: Path, monkeypatch: pytest.MonkeyPatch):
    first = heedful("budget", run, "--rows", "4")
    log = (run / "budget.jsonl").read_bytes()

    def measure(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(BudgetedLoss, "measure", measure)
    again = heedful("budget", run, "--rows", "4")
    assert again.code == 0, again.err
    assert "finished before" in again.err
    assert again.out == first.out
    assert (run / "budget.jsonl").read_bytes() == log


@pytest.mark.parametrize("after", [0, 1, 6, 11])
def test_the_same_command_goes_on(
    heedful: Heedful, run: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
):
    whole = shutil.copytree(run, tmp_path / "whole")
    assert heedful("budget", whole).code == 0
    left = after

    def measure(self: BudgetedLoss, budgets: Any) -> Any:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return original(self, budgets)

    original = BudgetedLoss.measure
    config = (run / "config.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(BudgetedLoss, "measure", measure)
        stopped = heedful("budget", run)
    assert stopped.code == 130
    assert stopped.out == ""
    assert stopped.err.splitlines()[-1] == "heedful budget: Interrupted: stopped; the same command goes on"
    assert (run / "config.json").read_bytes() == config
    assert not (run / "budget.png").exists()
    assert (run / "budget.jsonl").exists() == (after > 2)  # the first move waits for both layers

    done = heedful("budget", run)
    assert done.code == 0, done.err
    assert ("going on after" in done.err) == (after > 2)
    assert (run / "budget.jsonl").read_bytes() == (whole / "budget.jsonl").read_bytes()
    assert budgets_of(run) == budgets_of(whole)


def test_other_settings_are_refused(heedful: Heedful, run: Path, contents: Contents, text_file: Path):
    assert heedful("budget", run, "--rows", "4").code == 0
    before = contents(run)
    for flags, said in (
        (["--rows", "3"], "rows was 4, is 3"),
        (["--rows", "4", "--tolerance", "0.02"], "target was "),
        (["--rows", "4", "--policy", "random"], "policy was 'selective', is 'random'"),
        (["--rows", "4", "--data", text_file], "data was 'words.txt (validation)', is 'words.txt'"),
    ):
        message = heedful("budget", run, *flags).error(1)
        assert said in message
        assert "delete or rename it, or pass --restart" in message
        assert contents(run) == before
    again = heedful("budget", run, "--rows", "3", "--restart")
    assert again.code == 0, again.err
    assert json.loads((run / "budget.jsonl").read_text().splitlines()[0])["rows"] == 3


def test_other_weights_are_refused(heedful: Heedful, run: Path, make_run: Callable[..., Path]):
    assert heedful("budget", run).code == 0
    other = make_run("other-seed", score="selective", seed=1, steps=2)
    shutil.copy(other / "model.safetensors", run / "model.safetensors")
    assert "the weights of the model are others" in heedful("budget", run).error(1)


def test_baseline(heedful: Heedful, run: Path, plain: Path):
    done = heedful("budget", run, "--baseline", plain)
    assert done.code == 0, done.err
    assert "plain (softmax) with its full cache" in done.err
    header = json.loads((run / "budget.jsonl").read_text().splitlines()[0])
    search = [row for row in done.out.splitlines() if row.strip().startswith("baseline, full cache")]
    assert f"{header['target']:.4f}" in search[0]
    assert all(move["loss"] <= header["target"] for move in moves_of(run) if move["accepted"])
    assert "fewer bytes than the baseline with its full cache" in done.out
    assert "that of the baseline with its full cache" in " ".join(done.out.split())
    assert "finished before" in heedful("budget", run, "--baseline", plain).err


def test_bytes_of_the_caches(heedful: Heedful, run: Path, plain: Path):
    """Full caches hold k, v (and F) of every token and no more; budgets hold that of their slots."""
    done = heedful("budget", run, "--baseline", plain)
    cells = {row.split("  ")[0].strip(): row.split() for row in done.out.splitlines() if row.strip()}
    values = 2 * 2 * CONTEXT * 32  # layers, k and v, tokens, width
    assert cells["full cache"][-1] == f"{4 * (values + 2 * CONTEXT):,}"
    assert cells["baseline, full cache"][-1] == f"{4 * values:,}"
    held = int(cells["budgets"][-1].replace(",", ""))
    assert held >= 4 * sum(budgets_of(run)) * (2 * 32 + 1)
    assert held < 4 * values


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer": "bpe", "vocab_size": 300}, "has another tokenizer"),
        ({"context": 16}, "was trained with a context of 16 tokens"),
        ({"data": "synthetic:variable-assignment"}, "was trained on synthetic:variable-assignment"),
    ],
    ids=["tokenizer", "context", "task"],
)
def test_a_baseline_that_cannot_be_compared(
    heedful: Heedful,
    run: Path,
    make_run: Callable[..., Path],
    settings: dict[str, Any],
    said: str,
    contents: Contents,
):
    other = make_run("other-" + "-".join(settings), **{**settings, "steps": 1})
    before = contents(run)
    assert said in heedful("budget", run, "--baseline", other).error(1)
    assert contents(run) == before


def test_a_target_below_the_full_cache(
    heedful: Heedful, run: Path, make_run: Callable[..., Path], contents: Contents
):
    before = contents(run)
    message = heedful("budget", run, "--target-loss", "0.5").error(1)
    assert "the loss with the full cache is" in message
    assert "already above the target of 0.5000" in message
    assert contents(run) == before
    weak = shutil.copytree(make_run("weak", score="selective", steps=1), run.with_name("weak"))
    assert "already above the target" in heedful("budget", weak, "--baseline", run).error(1)
    assert not (weak / "budget.jsonl").exists()


def test_other_policies_are_kept_with_their_budgets(
    heedful: Heedful, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = shutil.copytree(plain, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(BudgetSearch, "__init__", lambda *_, **__: pytest.fail("measured"))
        message = heedful("budget", run).error(1)
    assert "'selective' needs a model with score 'selective' in every layer, layer 0 has 'softmax'" in message
    done = heedful("budget", run, "--policy", "streaming", "--target-loss", "5")
    assert done.code == 0, done.err
    kept = {
        "budget": [2, 2],
        "policy": "streaming",
        "evict_every": 1,
        "threshold": None,
        "grace": 1,
        "first": 1,
    }
    assert json.loads((run / "config.json").read_text()) == {**config, "eviction": kept}
    assert "written in" in done.out
    assert "lowest budget" in done.out
    assert (run / "budget.png").exists()


def test_nothing_can_be_lowered(heedful: Heedful, run: Path, monkeypatch: pytest.MonkeyPatch):
    original = BudgetedLoss.measure

    def measure(self: BudgetedLoss, budgets: Any) -> Any:
        measured = original(self, budgets)
        object.__setattr__(measured, "loss", 9.0)
        return measured

    monkeypatch.setattr(BudgetedLoss, "measure", measure)
    config = (run / "config.json").read_bytes()
    done = heedful("budget", run)
    assert done.code == 0, done.err
    assert "config.json is unchanged: no budget could be lowered" in done.out
    assert (run / "config.json").read_bytes() == config


def test_a_synthetic_task(heedful: Heedful, make_run: Callable[..., Path], tmp_path: Path):
    task = make_run(
        "task", data="synthetic:variable-assignment", score="selective", context=13, steps=3, lr=1e-3
    )
    run = shutil.copytree(task, tmp_path / "run")
    done = heedful("budget", run, "--rows", "8", "--tolerance", "0.1")
    assert done.code == 0, done.err
    assert "synthetic:variable-assignment: 8 rows of 13 tokens to search on, 32 to report on" in done.err
    assert len(budgets_of(run)) == 2
    refused = heedful("budget", run, "--data", tmp_path / "text.txt").error(1)
    assert "reads no text; leave out --data" in refused


def test_another_text(heedful: Heedful, run: Path, text_file: Path, tmp_path: Path):
    assert "nowhere.txt" in heedful("budget", run, "--data", tmp_path / "nowhere.txt").error(1)
    done = heedful("budget", run, "--data", text_file, "--rows", "6", "--target-loss", "4")
    assert done.code == 0, done.err
    assert "words.txt: 6 rows of 32 tokens to search on, 24 to report on" in done.err


WRONG = {
    "two-targets": (["--target-loss", "3", "--baseline", "b"], "give one of them"),
    "tolerance": (["--target-loss", "3", "--tolerance", "0.1"], "--tolerance counts from the run's own loss"),
    "target": (["--target-loss", "-1"], "--target-loss must be greater than 0 and finite, got -1.0"),
    "infinite": (["--target-loss", "inf"], "--target-loss must be greater than 0 and finite, got inf"),
    "negative": (["--tolerance", "-0.1"], "--tolerance must be 0 or more and finite, got -0.1"),
    "rows": (["--rows", "0"], "--rows must be 1 or more, got 0"),
    "policy": (["--policy", "selektive"], "--policy must be one of"),
}


@pytest.mark.parametrize(("flags", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_usage(heedful: Heedful, run: Path, contents: Contents, flags: list[str], said: str):
    before = contents(run)
    assert said in heedful("budget", run, *flags).error(2)
    assert contents(run) == before


def test_no_run(heedful: Heedful, run: Path, tmp_path: Path):
    assert "nowhere does not exist" in heedful("budget", tmp_path / "nowhere").error(1)
    assert "nowhere does not exist" in heedful("budget", run, "--baseline", tmp_path / "nowhere").error(1)
    (run / "train.json").unlink()
    assert "holds no training run (no train.json)" in heedful("budget", run).error(1)

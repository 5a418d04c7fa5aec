"""A comparison: what it writes, how it goes on, what a failure costs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

import heedful.comparison.jobs as compare_module
import heedful.training.run as train_module
from heedful.comparison import CompareSettings
from heedful.comparison.plot import plot_curves
from heedful.comparison.sweep import SWEEP_SEED
from heedful.comparison.table import summarise
from heedful.training import Interrupted, RunResult, TrainSettings

Settings = Callable[..., CompareSettings]
Compare = Callable[..., list[RunResult]]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """The runs that were really trained."""
    runs: list[tuple[str, str, int]] = []

    class Spy(train_module.LanguageModelTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            config = self.model.config
            runs.append((config.attention, config.score, self.args.seed))
            return super().train(*args, **kwargs)

    monkeypatch.setattr(train_module, "LanguageModelTrainer", Spy)
    return runs


def test_everything_is_written(settings: Settings, quiet_compare: Compare, tmp_path: Path):
    s = settings(score=("softmax", "selective"), seeds=2)
    results = quiet_compare(s, tmp_path / "cmp")
    out = tmp_path / "cmp"
    assert {p.name for p in out.iterdir()} == {
        "compare.json",
        "compare.png",
        "results.jsonl",
        "runs",
        "summary.md",
    }
    rows = read(out / "results.jsonl")
    assert [(r["attention"], r["score"], r["seed"]) for r in rows] == [
        (a, s, seed) for a in ("mha", "sas") for s in ("softmax", "selective") for seed in (0, 1)
    ]
    assert rows == [json.loads(json.dumps(r.to_dict())) for r in results]
    promised = {"attention", "score", "seed", "params", "flops_per_token", "tokens", "val_loss", "val_bpb"}
    promised |= {"seconds_per_step", "cache_bytes_per_token", "config"}
    for row in rows:
        assert promised <= {name for name, value in row.items() if value is not None}
        assert row["config"]["train"]["seed"] == row["seed"]
        assert row["config"]["model"]["attention"] == row["attention"]
        assert row["tokens"] == 3 * 4 * 32

    summary = (out / "summary.md").read_text()
    for form in ("mha x softmax", "mha x selective", "sas x softmax", "sas x selective"):
        assert f"| {form} | 2 | " in summary
    assert "2 seeds. The difference is paired" in summary
    assert " ± " in summary
    assert "| first |" in summary
    assert "does not rank" not in summary
    assert "3 steps of 4 x 32 tokens; held equal: nothing but depth and width" in summary
    assert "learning rate: equal for all forms" in summary
    assert "same logit scale (standard deviation 0.2)" in summary
    assert "![curves](compare.png)" in summary

    picture = matplotlib.image.imread(out / "compare.png")
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1000
    assert len({tuple(p) for p in picture[::7, ::7].reshape(-1, picture.shape[2])}) > 10


def test_one_seed_does_not_rank(settings: Settings, quiet_compare: Compare, tmp_path: Path):
    quiet_compare(settings(), tmp_path)
    summary = (tmp_path / "summary.md").read_text()
    assert "**One seed: this table does not rank the forms.**" in summary
    assert "±" not in summary


def test_going_on_trains_what_is_missing(
    settings: Settings, quiet_compare: Compare, tmp_path: Path, trained: list[tuple[str, str, int]]
):
    first = quiet_compare(settings(), tmp_path)
    assert trained == [("mha", "softmax", 0), ("sas", "softmax", 0)]
    trained.clear()

    again = quiet_compare(settings(), tmp_path)
    assert not trained
    assert [vars(r) for r in again] == [vars(r) for r in first]

    quiet_compare(settings(seeds=2), tmp_path)
    assert trained == [("mha", "softmax", 1), ("sas", "softmax", 1)]
    trained.clear()

    quiet_compare(settings(seeds=2, attention=("mha", "mqa", "sas")), tmp_path)
    assert trained == [("mqa", "softmax", 0), ("mqa", "softmax", 1)]
    assert len(read(tmp_path / "results.jsonl")) == 6


def test_stopped_and_repeated(
    settings: Settings,
    quiet_compare: Compare,
    tmp_path: Path,
    trained: list[tuple[str, str, int]],
    monkeypatch: pytest.MonkeyPatch,
):
    real = compare_module.train

    def stopping(run: TrainSettings, *args: Any, **kwargs: Any) -> RunResult:
        if run.attention == "sas":
            raise Interrupted("stopped")
        return real(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "train", stopping)
        with pytest.raises(Interrupted):
            quiet_compare(settings(), tmp_path)
    assert [r["attention"] for r in read(tmp_path / "results.jsonl")] == ["mha"]
    assert (tmp_path / "summary.md").exists()
    assert (tmp_path / "compare.png").exists()
    trained.clear()
    assert len(quiet_compare(settings(), tmp_path)) == 2
    assert trained == [("sas", "softmax", 0)]


def test_a_failure_loses_nothing_else(
    settings: Settings, quiet_compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = compare_module.train

    def failing(run: TrainSettings, *args: Any, **kwargs: Any) -> RunResult:
        if run.attention == "mha" and run.seed == 1:
            raise RuntimeError("out of memory\nwith details")
        return real(run, *args, **kwargs)

    s = settings(seeds=2)
    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "train", failing)
        message = (
            r"1 of 4 runs failed \(mha-softmax-seed1: out of memory\); the others are in .* Run the same"
        )
        with pytest.raises(RuntimeError, match=message):
            quiet_compare(s, tmp_path)
    rows = read(tmp_path / "results.jsonl")
    assert [(r["attention"], r["seed"]) for r in rows] == [("mha", 0), ("sas", 0), ("sas", 1)]
    assert "sas x softmax" in (tmp_path / "summary.md").read_text()
    assert len(quiet_compare(s, tmp_path)) == 4
    assert len(read(tmp_path / "results.jsonl")) == 4


def test_everything_fails(
    settings: Settings, quiet_compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def failing(*args: Any, **kwargs: Any) -> RunResult:
        raise ValueError("no")

    monkeypatch.setattr(compare_module, "train", failing)
    with pytest.raises(RuntimeError, match="2 of 2 runs failed"):
        quiet_compare(settings(), tmp_path)
    assert not (tmp_path / "results.jsonl").exists()


def test_other_settings_are_refused(settings: Settings, quiet_compare: Compare, tmp_path: Path):
    quiet_compare(settings(attention=("mha",)), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match=r"other settings \(steps was 3, is 4; lr was 0.002, is 0.1\); repeat those"
    ):
        quiet_compare(settings(attention=("mha",), steps=4, lr=0.1), tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(match was 'none', is 'params'\)"):
        quiet_compare(settings(attention=("mha",), match="params"), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_matched_form_stays_first(settings: Settings, quiet_compare: Compare, tmp_path: Path):
    quiet_compare(settings(attention=("mha",), match="params", d_ff=300), tmp_path)
    with pytest.raises(ValueError, match="matched its forms to mha; keep it first"):
        quiet_compare(settings(attention=("sas", "mha"), match="params", d_ff=300), tmp_path)
    results = quiet_compare(settings(match="params", d_ff=300), tmp_path)
    assert abs(results[1].params / results[0].params - 1) < 0.01
    assert "held equal: parameters" in (tmp_path / "summary.md").read_text()


def test_a_folder_older_than_a_setting_goes_on(
    settings: Settings, quiet_compare: Compare, tmp_path: Path, trained: list[tuple[str, str, int]]
):
    quiet_compare(settings(attention=("mha",)), tmp_path)
    path = tmp_path / "compare.json"
    before = json.loads(path.read_text())
    for name in ("dropout", "text_column", "trainer"):
        del before["train"][name]
    path.write_text(json.dumps(before))
    trained.clear()
    quiet_compare(settings(attention=("mha",)), tmp_path)
    assert not trained
    path.write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"other settings \(dropout was 0\.0, is 0\.5\)"):
        quiet_compare(settings(attention=("mha",), dropout=0.5), tmp_path)
    del before["train"]["steps"]  # every version wrote it
    path.write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"compare\.json is damaged \(no steps\); use another --out"):
        quiet_compare(settings(attention=("mha",)), tmp_path)


def test_folders_are_never_overwritten(settings: Settings, quiet_compare: Compare, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file is a file, expected a folder"):
        quiet_compare(settings(), tmp_path / "file")
    with pytest.raises(FileExistsError, match="is not empty and holds no comparison"):
        quiet_compare(settings(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_bad_data_leaves_nothing(settings: Settings, quiet_compare: Compare, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        quiet_compare(settings(data=str(tmp_path / "nowhere.txt")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_learning_rate_sweep(
    settings: Settings, quiet_compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every form trains on with its own best rate."""
    best = {"mha": 1e-3, "sas": 1e-2}
    real = compare_module.train

    def judged(run: TrainSettings, *args: Any, **kwargs: Any) -> RunResult:
        result = real(run, *args, **kwargs)
        return dataclasses.replace(result, val_loss=1.0 if run.lr == best[run.attention] else 2.0)

    monkeypatch.setattr(compare_module, "train", judged)
    s = settings(lr_sweep=(1e-3, 3e-3, 1e-2), seeds=2)
    results = quiet_compare(s, tmp_path)
    assert [(r.attention, r.seed, r.lr) for r in results] == [
        ("mha", 0, 1e-3),
        ("mha", 1, 1e-3),
        ("sas", 0, 1e-2),
        ("sas", 1, 1e-2),
    ]
    sweep = read(tmp_path / "sweep.jsonl")
    assert [(r["form"], r["lr"], r["val_loss"], r["seed"]) for r in sweep] == [
        (f"{a} x softmax", lr, 1.0 if lr == best[a] else 2.0, SWEEP_SEED)
        for a in ("mha", "sas")
        for lr in (1e-3, 3e-3, 1e-2)
    ]
    summary = (tmp_path / "summary.md").read_text()
    assert "learning rate: the best of a sweep, per form" in summary
    assert "| mha x softmax | **1.000** | 2.000 | 2.000 |" in summary
    assert "at an edge of the sweep, there may be a better one: mha x softmax, sas x softmax." in summary
    quiet_compare(s, tmp_path)
    assert read(tmp_path / "sweep.jsonl") == sweep


def test_key_heads_go_to_the_forms_that_have_a_number_of_their_own():
    given = {"score": ("softmax",), "n_heads": 4, "n_kv_heads": 2, "d_model": 32}
    forms = CompareSettings.of(attention=("mha", "gqa", "mqa", "mla"), **given).forms(257, 32)
    configs = [s.to_decoder_config(257, 32).attention_configs()[0] for s in forms]
    assert [c.n_kv_heads for c in configs] == [4, 2, 1, 4]
    with pytest.raises(ValueError, match="'mha' has 4 key/value heads by definition, got n_kv_heads=2"):
        CompareSettings.of(attention=("mha",), **given)


def test_options_go_to_the_forms_that_have_them(settings: Settings):
    s = settings(attention=("mha", "sas"), score=("softmax", "selective"))
    train = dataclasses.replace(s.train)
    object.__setattr__(train, "attention_options", {"sim_heads": 4})
    forms = dataclasses.replace(s, train=train).forms(257, 32)
    assert [f.attention_options for f in forms] == [{}, {}, {"sim_heads": 4}, {"sim_heads": 4}]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"attention": ()}, "--attention and --score need at least one form each"),
    "twice": ({"score": ("softmax", "softmax")}, "--score names a form twice: softmax,softmax"),
    "seeds": ({"seeds": 0}, "--seeds must be 1 or more, got 0"),
    "rates": ({"lr_sweep": (1e-3, -1.0)}, r"--lr-sweep needs learning rates greater than 0, got -1\.0"),
    "form": ({"attention": ("mha", "sass")}, "unknown attention 'sass'; did you mean 'sas'?"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_unsound_settings(settings: Settings, wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        settings(**wrong)


def result(attention: str, seed: int, loss: float, **more: Any) -> RunResult:
    fields: dict[str, Any] = {
        "attention": attention,
        "score": "softmax",
        "seed": seed,
        "lr": 1e-3,
        "params": 1000,
        "flops_per_token": 2_500_000,
        "tokens": 100,
        "val_loss": loss,
        "val_bpb": loss / 2,
        "val_accuracy": 0.5,
        "seconds_per_step": 0.02,
        "tokens_per_second": 1.0,
        "cache_bytes_per_token": 64,
        "curve": [(50, loss + 1, 0.1), (100, loss, 0.2)],
        "config": {},
    }
    return RunResult(**{**fields, **more})


def test_many_curves_can_be_drawn(tmp_path: Path):
    """More forms than colours, all ending at the same loss, seeds with curves of unequal length."""
    runs = [result(f"form{i}", seed, 2.0) for i in range(10) for seed in (0, 1)]
    runs[1] = dataclasses.replace(runs[1], curve=runs[1].curve[:1])
    plot_curves(summarise(runs), tmp_path / "many.png", "Title", "subtitle")
    assert matplotlib.image.imread(tmp_path / "many.png").shape[0] > 600

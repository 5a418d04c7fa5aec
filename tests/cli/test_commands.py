"""The commands at work: train, resume, compare, generate, demo, and a form of one's own."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

import heedful.demo as demo_module
import heedful.training.run as run_module
from heedful.testing import CHECKS

Heedful = Callable[..., Any]

# A form as a stranger would write it: keys double as values.
FORM = '''"""Keys double as values."""

from dataclasses import dataclass

from torch import nn

import heedful


@heedful.register_attention("tied_kv")
class TiedKV(heedful.Attention):
    """Keys double as values: half the cache."""

    @dataclass(frozen=True)
    class Config(heedful.AttentionConfig):
        """Keys double as values: half the cache."""

        shrink: int = heedful.option(1, "divides the values")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        width = self.config.n_heads * self.config.size
        self.q_proj = nn.Linear(self.config.d_model, width, bias=False)
        self.kv_proj = nn.Linear(self.config.d_model, width, bias=False)
        self.reset_parameters()

    def project(self, x, positions):
        q = self.split_heads(self.q_proj(x), self.config.n_heads)
        kv = self.split_heads(self.kv_proj(x), self.config.n_heads)
        return self.place_queries(q, positions), {"k": self.place_keys(kv, positions), "v": kv / self.config.shrink}
'''


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_and_generate(heedful: Heedful, small: list[str], tmp_path: Path):
    out = tmp_path / "run"
    form = [
        "--attention",
        "sas",
        "--score",
        "selective",
        "--attention.sim-heads",
        "4",
        "--score.impl",
        "sdpa",
    ]
    done = heedful("train", *small, *form, "--out", out, "--n-layers", "2", "--no-qk-norm")
    assert done.code == 0, done.err
    assert "sas x selective  step 4/4" in done.err
    assert "bits per byte" in done.err
    assert f"saved in {out}" in done.err
    config = json.loads((out / "config.json").read_text())
    assert config["attention_options"] == {"sim_heads": 4}
    assert config["score_options"] == {"impl": "sdpa"}
    assert (config["num_hidden_layers"], config["qk_norm"]) == (2, False)
    done = heedful("generate", out, "the cat", "--max-new-tokens", "5")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("the cat")


@pytest.mark.parametrize("prompt", ["the cat", "", "naïve — 猫 🐈", "<|endoftext|> is text", "-"], ids=repr)
def test_generate(heedful: Heedful, trained: Path, prompt: str):
    greedy = [
        heedful("generate", trained, prompt, "--temperature", "0", "--max-new-tokens", "8") for _ in range(2)
    ]
    assert greedy[0].code == 0, greedy[0].err
    assert greedy[0].out == greedy[1].out
    assert greedy[0].err == ""
    assert greedy[0].out.startswith(prompt)


def test_generate_draws_by_seed(heedful: Heedful, trained: Path):
    flags = ["--max-new-tokens", "30", "--temperature", "2", "--top-k", "0"]
    first, same, other = (heedful("generate", trained, "the", "--seed", s, *flags).out for s in (0, 0, 1))
    assert first == same
    assert first != other


def test_generate_prompt_longer_than_the_context(heedful: Heedful, trained: Path):
    prompt = "the cat sat on a mat and saw " * 5
    assert heedful("generate", trained, prompt, "--max-new-tokens", "3").out.startswith(prompt)


def interrupted(heedful: Heedful, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """Run a command and stop it after its second step."""

    class Pressed(run_module.StopOnCtrlC):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.pressed = state.global_step == 2
            super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopOnCtrlC", Pressed)
        return heedful(*arguments)


def test_resume_needs_no_other_flags(
    heedful: Heedful, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    form = [
        "--attention",
        "sas",
        "--attention.sim-heads",
        "4",
        "--attention.init",
        "identity",
        "--steps",
        "6",
    ]
    run, whole = tmp_path / "run", tmp_path / "whole"
    stopped = interrupted(heedful, monkeypatch, "train", *small, *form, "--out", run)
    assert stopped.code == 130
    assert f"stopped at step 2 of 6; go on with: heedful train --resume --out {run}" in stopped.err

    assert "training has not finished: heedful train --resume" in heedful("generate", run).error(1)
    assert "already holds a run; use --resume" in heedful("train", *small, *form, "--out", run).error(1)
    for other, said in (
        (["--steps", "500"], "steps was 6 and is 500"),  # the default, but not of this run
        (["--attention", "mha"], "attention was 'sas' and is 'mha'"),
        (
            ["--attention.sim-heads", "6"],
            "{'sim_heads': 4, 'init': 'identity'} and is {'sim_heads': 6, 'init'",
        ),
    ):
        assert said in heedful("train", "--resume", "--out", run, *other).error(1)

    done = heedful("train", "--out", run, "--resume", "--attention.sim-heads", "4")  # repeating is fine
    assert done.code == 0, done.err
    assert heedful("train", *small, *form, "--out", whole).code == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert heedful("train", "--out", run, "--resume").code == 0


def test_resume_from_a_corrupt_checkpoint(
    heedful: Heedful, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    interrupted(heedful, monkeypatch, "train", *small, "--out", run)
    weights = run / "checkpoints" / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(b"abc")
    message = heedful("train", "--resume", "--out", run).error(1)
    assert "checkpoint-2 cannot be read" in message
    assert "delete that folder" in message


def test_compare(heedful: Heedful, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "cmp"
    flags = [*small, "--attention", "mha,sas", "--score", "softmax", "--seeds", "1", "--out", out]
    options = ["--attention.sim-heads", "4", "--lr-sweep", "1e-3,1e-2"]
    stopped = interrupted(heedful, monkeypatch, "compare", *flags, *options)
    assert stopped.code == 130
    assert "stopped at step 2 of 4; the same command goes on" in stopped.err
    done = heedful("compare", *flags, *options)
    assert done.code == 0, done.err
    assert "mha x softmax" in done.out
    assert "does not rank the forms" in done.out
    assert f"written: {out / 'summary.md'}" in done.out
    rows = read(out / "results.jsonl")
    assert [r["config"]["model"]["attention_options"] for r in rows] == [{}, {"sim_heads": 4}]
    assert len(read(out / "sweep.jsonl")) == 4
    refused = heedful("compare", *flags, *options, "--steps", "7").error(1)
    assert "holds a comparison with other settings (steps was 4, is 7)" in refused


@pytest.fixture
def form_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_form.py"
    path.write_text(FORM)
    return path


def test_a_form_of_ones_own(heedful: Heedful, small: list[str], form_file: Path, tmp_path: Path):
    forms, out = ["--forms", form_file], tmp_path / "cmp"
    assert "tied_kv" not in heedful("ls").out
    listed = heedful(*forms, "ls").out
    assert "tied_kv " in listed
    assert "Keys double as values" in listed
    assert "--attention.shrink" in heedful("show", "tied_kv", f"--forms={form_file}").out
    assert "--attention.shrink" in heedful("train", "--attention", "tied_kv", *forms, "--help").out

    CHECKS["cached_equals_full"]("tied_kv", "selective")

    flags = ["--attention", "mha,tied_kv", "--score", "selective", "--seeds", "1", "--attention.shrink", "2"]
    done = heedful(*forms, "compare", *small, *flags, "--match", "params", "--out", out)
    assert done.code == 0, done.err
    rows = read(out / "results.jsonl")
    assert [r["attention"] for r in rows] == ["mha", "tied_kv"]
    assert abs(rows[1]["params"] / rows[0]["params"] - 1) < 0.01
    assert rows[1]["config"]["model"]["attention_options"] == {"shrink": 2}


def test_a_form_from_the_environment(
    heedful: Heedful, form_file: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = ["train", *small, "--attention", "tied_kv", "--out", tmp_path / "run"]
    unknown = heedful(*flags).error(2)
    assert "unknown attention 'tied_kv'" in unknown
    assert "--forms my_form.py, or HEEDFUL_FORMS=my_form.py" in unknown
    done = subprocess.run(
        [sys.executable, "-m", "heedful", *map(str, flags)],
        env={**os.environ, "HEEDFUL_FORMS": str(form_file)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "unknown attention 'tied_kv'" in heedful("generate", tmp_path / "run", "the").error(1)
    monkeypatch.setenv("HEEDFUL_FORMS", str(form_file))
    assert heedful("generate", tmp_path / "run", "the").out.startswith("the")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def broken(:", "SyntaxError"),
        ("import nothing_like_this", "ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        (
            "import heedful\n@heedful.register_attention('mha')\nclass Mine(heedful.Attention): pass",
            "already",
        ),
    ],
)
def test_a_broken_form(heedful: Heedful, tmp_path: Path, text: str, said: str):
    path = tmp_path / "broken.py"
    path.write_text(text)
    message = heedful("--forms", path, "ls").error(2)
    assert f"--forms: {path} cannot be imported: " in message
    assert said in message


@pytest.mark.slow
def test_demo(heedful: Heedful, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The whole demo, on a small text for a few steps; a second time nothing is trained."""
    tiny: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "batch_size": 4, "steps": 3}
    text = {"data": str(text_file), "tokenizer": "bytes", "context": 32}
    monkeypatch.setattr(demo_module, "TEXT", dataclasses.replace(demo_module.TEXT, **tiny, **text))
    monkeypatch.setattr(demo_module, "TASK", dataclasses.replace(demo_module.TASK, **tiny))
    done = heedful("demo", "--out", tmp_path / "demo")
    assert done.code == 0, done.err
    for name in ("compare.png", "kv-text.png", "variable-assignment.png", "kv-budget.png"):
        assert min(matplotlib.image.imread(tmp_path / "demo" / name).shape[:2]) > 500
    assert len(read(tmp_path / "demo" / "results.jsonl")) == 4
    summary = (tmp_path / "demo" / "summary.md").read_text()
    for part in (
        "does not rank the forms",
        "fewer bytes",
        "# Variable assignment",
        "128 statements",
        "# Text from",
    ):
        assert part in summary
    weights = tmp_path / "demo" / "variable-assignment" / "selective" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert heedful("demo", "--out", tmp_path / "demo").code == 0
    assert weights.stat().st_mtime_ns == before
    assert (tmp_path / "demo" / "summary.md").read_text().count("# Variable assignment") == 1

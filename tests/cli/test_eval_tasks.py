"""`heedful eval --tasks`: the table, what it leaves, and what it refuses."""

import functools
import importlib.util
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful.hf.load import load_model, load_tokenizer

Heedful = Callable[..., Any]


@pytest.fixture
def harness() -> None:
    pytest.importorskip("lm_eval", reason='pip install "heedful[tasks]"')


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder as that of BLiMP: words of the text in order, and not."""
    lines = [
        json.dumps(
            {"sentence_good": f"the cat sat on a {noun}", "sentence_bad": f"{noun} a on sat", "UID": kind}
        )
        for kind, noun in (("mats", "mat"), ("dogs", "dog"))
    ]
    folder = tmp_path / "pairs"
    folder.mkdir()
    for kind, line in zip(("mats", "dogs"), lines, strict=True):
        (folder / f"{kind}.jsonl").write_text(line + "\n")
    return folder


def test_tasks(
    heedful: Heedful, harness: None, trained: Path, text_file: Path, pairs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "out"
    flags = ("--kv-budget", "40,full", "--policy", "streaming,tova", "--kv-first", "2", "--limit", "2")
    more = ("--length", "200", "--task-data", pairs, "--data", text_file, "--context", "64")
    monkeypatch.setattr(socket.socket, "connect", lambda *address: pytest.fail("asked the network"))
    done = heedful("eval", trained, "--tasks", "blimp,text,needle,mqar", *flags, *more, "--out", out)
    assert done.code == 0, done.err
    assert "%|" not in done.err  # no bars of the harness
    assert [file.name for file in out.iterdir()] == ["tasks.json"]
    raw = json.loads((out / "tasks.json").read_text())
    assert (raw["model"], raw["limit"]) == (str(trained), 2)
    results = raw["results"]
    names = ["blimp", "text", "needle_200", "mqar_200"]
    assert [(r["policy"], r["kv_budget"], r["name"]) for r in results] == [
        (policy, budget, name)
        for policy, budget in ((None, "full"), ("streaming", 40), ("tova", 40))
        for name in names
    ]
    for result in results:
        full = result["policy"] is None
        assert result["first"] == (1 if full else 2)
        assert result["evicted"] == (not full and result["name"] != "blimp")
        assert result["held"] == 40 or full or result["name"] == "blimp"
    assert set(results[0]["parts"]) == {"dogs", "mats"}

    # Bits per byte of the text, by hand.
    model, tokenizer = load_model(trained), load_tokenizer(trained)
    text = text_file.read_text()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    last = ids.shape[1] - 1
    for number, kv in ((1, {}), (5, {"kv_budget": 40, "kv_policy": "streaming", "kv_first": 2})):
        nll = 0.0
        for start in range(0, last, 64):
            begin = min(start, last - 64)
            piece = model.evaluate_nll(ids[:, begin : begin + 65], reduction="none", **kv)
            nll += piece[0, start - begin :].sum().item()
        (figure,) = results[number]["figures"]
        assert figure["metric"] == "bits_per_byte"
        assert figure["value"] == pytest.approx(nll / len(text.encode()) / 0.6931471805599453, rel=1e-5)

    lines = done.out.splitlines()
    header = next(line.split() for line in lines if "metric" in line)
    assert header == ["task", "metric", "policy", "tokens", "held", "value", "±"]
    assert sum("bits_per_byte" in line for line in lines) == 6
    assert "blimp: no text is longer than a cache of 40: nothing was evicted" in lines
    assert lines[-1] == f"written: {out / 'tasks.json'}"


def test_without_the_harness(heedful: Heedful, trained: Path, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("heedful.lm_eval.find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert 'pip install "heedful[tasks]"' in heedful("eval", trained, "--tasks", "copy").error(1)
    assert not (trained / "eval").exists()


def test_flags_that_need_tasks(heedful: Heedful, trained: Path):
    for flag in (("--limit", "3"), ("--length", "64"), ("--task-data", "x")):
        assert f"{flag[0]} belongs to --tasks" in heedful("eval", trained, *flag).error(2)


@pytest.mark.parametrize(
    "flags, message, code",
    [
        (["--tasks", "blimp"], "--task-data FOLDER", 1),
        (["--tasks", "text"], "--data FILE", 1),
        (["--tasks", "copy", "--data", "x.txt"], "--data belongs to the task 'text'", 2),
        (["--tasks", "copy", "--task-data", "x"], "--task-data belongs to the task 'blimp'", 2),
        (["--tasks", "copy", "--rows", "3"], "--rows belongs to a text", 2),
        (["--tasks", "copy", "--limit", "0"], "--limit must be 1 or more", 2),
        (["--tasks", "copy", "--length", "0"], "--length takes different numbers above 0", 2),
        (["--tasks", "copy", "--length", "5000"], "--length 5000 is more than the model reads, 2048", 2),
        (["--tasks", "copy", "--length", "9"], "task copy: expected a length of", 1),
        (["--tasks", "copy", "--policy", "selective"], "--policy: the policy 'selective' needs", 2),
    ],
    ids=lambda value: " ".join(value[2:] or value) if isinstance(value, list) else "",
)
def test_refused(heedful: Heedful, harness: None, trained: Path, flags: list[str], message: str, code: int):
    assert message in heedful("eval", trained, *flags, "--kv-budget", "8").error(code)
    assert not (trained / "eval").exists()


def test_a_task_that_nobody_knows(
    heedful: Heedful, harness: None, trained: Path, monkeypatch: pytest.MonkeyPatch
):
    from heedful.lm_eval import tasks

    ours_alone = functools.partial(tasks.TaskManager, include_defaults=False)  # to read theirs takes long
    monkeypatch.setattr(tasks, "TaskManager", ours_alone)
    message = heedful("eval", trained, "--tasks", "coppy").error(1)
    assert "the task 'coppy' is not known; did you mean 'copy'? ours are blimp, copy" in message


def test_interrupted(
    heedful: Heedful, harness: None, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from heedful.lm_eval import run

    evaluate = run.evaluate
    done: list[int] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(run, "evaluate", once)
    flags = ("--tasks", "copy", "--length", "100", "--limit", "2", "--kv-budget", "8,full", "--out", tmp_path)
    message = heedful("eval", trained, *flags, "--policy", "streaming").error(130)
    assert f"stopped after 1 of 2 measurements; those done are in {tmp_path / 'tasks.json'}" in message
    assert len(json.loads((tmp_path / "tasks.json").read_text())["results"]) == 1

"""Runs side by side, on a cluster, at equal seconds, and a baseline of several lengths."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import heedful.comparison.timetable as timetable
from heedful.comparison import CompareSettings, compare
from heedful.training import RunResult

Settings = Callable[..., CompareSettings]
Compare = Callable[..., list[RunResult]]
TIMES = ("seconds_per_step", "tokens_per_second")


def rows(path: Path) -> list[dict[str, Any]]:
    """Without what a clock says."""
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read]


@pytest.mark.slow
def test_two_at_a_time_are_those_one_after_the_other(settings: Settings, tmp_path: Path):
    s = settings(lr_sweep=(1e-3, 1e-2), seeds=2)
    said = io.StringIO()
    compare(s, tmp_path / "one", console=Console(quiet=True))
    compare(s, tmp_path / "two", console=Console(file=said, width=200), workers=2)
    assert rows(tmp_path / "two" / "results.jsonl") == rows(tmp_path / "one" / "results.jsonl")
    one, two = (sorted(map(str, rows(tmp_path / how / "sweep.jsonl"))) for how in ("one", "two"))
    assert one == two
    lines = [line for line in said.getvalue().splitlines() if re.match(r"\d/8 .*: validation loss", line)]
    assert sorted(line.split("/")[0] for line in lines) == list("12345678")


def test_data_that_has_changed_is_not_mixed(
    settings: Settings, quiet_compare: Compare, text_file: Path, tmp_path: Path
):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    quiet_compare(settings(data=str(text)), tmp_path / "out")
    text.write_text(text_file.read_text().replace("e", "o"))
    with pytest.raises(ValueError, match=r"text\.txt has changed since the runs in .*; use another --out"):
        quiet_compare(settings(data=str(text), seeds=2), tmp_path / "out")


@pytest.mark.exhaustive
def test_a_failure_beside_others(settings: Settings, tmp_path: Path):
    s = settings(seeds=2)
    broken = tmp_path / "out" / "runs" / "mha-softmax-seed1"
    compare(settings(seeds=1), tmp_path / "out", console=Console(quiet=True))
    broken.mkdir()
    (broken / "train.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"1 of 4 runs failed \(mha-softmax-seed1: .*damaged"):
        compare(s, tmp_path / "out", console=Console(quiet=True), workers=2)
    assert len(rows(tmp_path / "out" / "results.jsonl")) == 3


def test_a_baseline_of_several_lengths(settings: Settings, quiet_compare: Compare, tmp_path: Path):
    s = settings(steps=4, baseline_steps=(2, 8), seeds=2)
    results = quiet_compare(s, tmp_path)
    assert [(r.attention, r.seed, r.tokens) for r in results] == [
        (a, seed, 4 * 4 * 32) for a in ("mha", "sas") for seed in (0, 1)
    ]
    longer = rows(tmp_path / "baseline.jsonl")
    assert [(r["attention"], r["seed"], r["tokens"]) for r in longer] == [
        ("mha", seed, n * 4 * 32) for n in (2, 8) for seed in (0, 1)
    ]
    summary = (tmp_path / "summary.md").read_text()
    assert "what mha x softmax would have to spend" in summary and "from 3 lengths" in summary
    assert "| form | FLOPs | seconds |" in summary
    before = rows(tmp_path / "results.jsonl"), longer
    quiet_compare(s, tmp_path)
    assert (rows(tmp_path / "results.jsonl"), rows(tmp_path / "baseline.jsonl")) == before
    with pytest.raises(ValueError, match=r"other than --steps \(4\), got 4"):
        settings(steps=4, baseline_steps=(4,))


def test_equal_seconds(
    settings: Settings, quiet_compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A form whose step takes twice as long trains half as many steps; it is measured once."""
    taken = {"mha": [0.1, 0.2], "sas": [0.5, 0.2]}
    asked: list[str] = []

    def seconds(form: Any, data: Any) -> float:
        asked.append(form.attention)
        return taken[form.attention][min(asked.count(form.attention), 2) - 1]

    monkeypatch.setattr(timetable, "seconds_per_step", seconds)
    s = settings(steps=6, match="seconds")
    results = quiet_compare(s, tmp_path)
    assert [r.tokens // (4 * 32) for r in results] == [6, 3]
    assert asked == ["mha", "sas"] * timetable.ROUNDS
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"mha x softmax": 0.1, "sas x softmax": 0.2}
    assert "held equal: seconds of training" in (tmp_path / "summary.md").read_text()
    quiet_compare(dataclasses.replace(s, seeds=2), tmp_path)
    assert len(asked) == 2 * timetable.ROUNDS


CLUSTER = """
import json, os, signal, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from heedful.comparison import CompareSettings, compare

def main():
    text, out = sys.argv[1], Path(sys.argv[2])
    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    small = dict(d_model=16, n_layers=1, n_heads=2, batch_size=4, context=32, tokenizer="bytes")
    small |= dict(score="softmax", seeds=2, data=text, steps=60, checkpoints=20)
    s = CompareSettings.of(attention=("mha", "sas"), **small)
    killed = []

    def assassin():
        while not killed:
            time.sleep(0.02)
            if not list(out.glob("runs/*/checkpoints/checkpoint-*/trainer_state.json")):
                continue
            for process in os.listdir("/proc"):
                try:
                    words = Path("/proc", process, "cmdline").read_bytes()
                except OSError:
                    continue
                if process.isdigit() and words.startswith(b"ray::_work"):
                    os.kill(int(process), signal.SIGKILL)
                    killed.append(process)
                    return

    threading.Thread(target=assassin, daemon=True).start()
    compare(s, out, console=Console(quiet=True), ray=cluster.address)
    cluster.shutdown()
    print("killed", len(killed))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_two_nodes_of_a_ray_cluster_and_a_worker_that_is_killed(
    settings: Settings, quiet_compare: Compare, text_file: Path, tmp_path: Path
):
    """The rows of the runs one after the other, here."""
    (tmp_path / "cluster.py").write_text(CLUSTER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    environment["RAY_worker_niceness"] = "0"  # or other tests leave its workers nothing
    command = [sys.executable, str(tmp_path / "cluster.py"), str(text_file), str(tmp_path / "cluster")]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.split()[-2:] == ["killed", "1"]
    quiet_compare(settings(seeds=2, steps=60, checkpoints=20, evaluations=5), tmp_path / "here")
    here, cluster = (rows(tmp_path / place / "results.jsonl") for place in ("here", "cluster"))
    assert len(cluster) == 4 and cluster == here


def test_without_ray(
    settings: Settings, quiet_compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "heedful\[ray\]"'):
        quiet_compare(settings(), tmp_path, ray="auto")


@pytest.mark.parametrize("address", ["localhost:1", "nowhere.invalid:6379", "ray://localhost:1", "[::1]:1"])
def test_no_cluster_there(settings: Settings, quiet_compare: Compare, tmp_path: Path, address: str):
    """Said at once, where Ray would try for minutes."""
    with pytest.raises(
        ConnectionError, match=rf"no Ray cluster answers at {re.escape(repr(address))}; start one"
    ):
        quiet_compare(settings(), tmp_path, ray=address)


@pytest.mark.slow
@pytest.mark.parametrize("reached", ["all processes, as from a terminal", "the first alone, as from kill"])
def test_ctrl_c_and_the_same_command(text_file: Path, tmp_path: Path, reached: str):
    """Two at a time: every run that trains saves a checkpoint, and goes on."""
    small = "--d-model 16 --n-layers 1 --n-heads 2 --batch-size 4 --context 32 --tokenizer bytes"
    out, every = tmp_path / "out", 50
    command = [sys.executable, "-m", "heedful", "compare", "--workers", "2", "--score", "softmax"]
    command += ["--data", str(text_file), "--seeds", "2", "--out", str(out), *small.split()]
    command += ["--steps", str(20 * every), "--checkpoints", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}

    def saved() -> dict[str, int]:
        """The newest checkpoint of each run."""
        newest: dict[str, int] = {}
        for path in out.glob("runs/*/checkpoints/checkpoint-*"):
            run, step = path.parts[-3], int(path.name.partition("-")[2])
            newest[run] = max(step, newest.get(run, 0))
        return newest

    process = subprocess.Popen(
        command, start_new_session=True, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(saved()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    before = saved()
    (os.killpg if reached.startswith("all") else os.kill)(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "the same command goes on" in stderr
    after = saved()
    assert len(before) == 2 and all(after[run] >= before[run] for run in before)
    assert any(step % every for step in after.values())  # saved where it was stopped


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(text_file: Path, tmp_path: Path):
    """They save, and leave nobody training for nobody."""
    small = (
        "--d-model 16 --n-layers 1 --n-heads 2 --batch-size 4 --context 32 --tokenizer bytes --steps 100000"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "heedful", "compare", "--workers", "2", "--score", "softmax"]
    command += ["--data", str(text_file), "--seeds", "1", "--out", str(out), *small.split()]
    command += ["--evaluations", "1000"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/log.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not members(process.pid)
    assert list(out.glob("runs/*/checkpoints/checkpoint-*"))


@pytest.mark.slow
def test_a_worker_that_is_killed(text_file: Path, tmp_path: Path):
    """A line says what became of it and what to do, and the rest of the workers end."""
    small = "--d-model 16 --n-layers 1 --n-heads 2 --batch-size 4 --context 32 --tokenizer bytes"
    out = tmp_path / "out"
    command = [sys.executable, "-m", "heedful", "compare", "--workers", "2", "--score", "softmax"]
    command += ["--data", str(text_file), "--seeds", "1", "--out", str(out), *small.split()]
    command += ["--steps", "100000", "--evaluations", "1000"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(out.glob("runs/*/log.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    found = subprocess.run(["ps", "-wweo", "pid=,pgid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in found.stdout.splitlines()]
    workers = [int(pid) for pid, group, words in rows if int(group) == process.pid and "spawn_main" in words]
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert "a worker process was killed" in stderr and "the same command goes on" in stderr
    assert "Traceback" not in stderr
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not members(process.pid)


def members(group: int) -> list[str]:
    """Processes of a group that live."""
    found = subprocess.run(
        ["ps", "-eo", "pid=,pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 3) for line in found.stdout.splitlines()]
    return [row[3] for row in rows if int(row[1]) == group and not row[2].startswith("Z")]

"""`benchmarks/gpu.py`, as far as Triton's interpreter goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def gpu(out: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The script on the CPU; `out` comes through $OUT."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--tiny", *options],
        env={**os.environ, "OUT": str(out)},
        capture_output=True,
        text=True,
    )
    folders = list(out.glob("*-cpu-*"))
    return done, folders[0] if folders else out


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.exhaustive
def test_every_part(tmp_path: Path):
    done, out = gpu(tmp_path)
    assert done.returncode == 0, done.stdout
    assert [row["part"] for row in lines(out / "parts.jsonl")] == [
        "tests",
        "check",
        "tune",
        "time",
        "steps",
        "train",
        "adapt",
    ]
    checks = lines(out / "checks.jsonl")
    assert {"out", "F", "d_q", "d_k", "d_v", "slot"} <= {row["tensor"] for row in checks}
    assert all(row["ok"] and row["error"] <= row["tolerance"] for row in checks)
    tilings = json.loads((out / "tilings.json").read_text())
    assert tilings["finished"] and tilings["trials"]
    timed = {(row["workload"], row["case"]) for row in lines(out / "timings.jsonl") if "ms" in row}
    assert {(work, "heedful triton") for work in ("training", "decode")} <= timed
    steps = lines(out / "steps.jsonl")
    assert {row["form"] for row in steps} >= {"mha", "selective", "forgetting", "sas"}
    assert all(row["seconds"] == min(row["turns"]) > 0 for row in steps)
    ends = [row for row in lines(out / "train.jsonl") if "validation_loss" in row]
    assert [row["form"] for row in ends] == ["mha softmax", "mha selective"]
    (adapted,) = lines(out / "adapt.jsonl")
    assert (
        adapted["held"] == 32 and adapted["local_tokens_per_second"] and adapted["distill_tokens_per_second"]
    )
    assert json.loads((out / "environment.json").read_text())["interpreted"]
    assert "interpreter" in (out / "summary.md").read_text()


@pytest.mark.slow
def test_a_part_that_fails_leaves_the_others(tmp_path: Path):
    """The first part is stopped by its limit, the second cannot write, the third runs all the same."""
    _, out = gpu(tmp_path, "--parts", "tests", "--limit", "tests=0.01")
    (out / "checks.jsonl").mkdir()
    done, out = gpu(tmp_path, "--parts", "tests,check,tune", "--limit", "tests=0.01")
    assert done.returncode == 1
    assert "failed: tests, check" in done.stderr
    stopped, broken, fine = lines(out / "parts.jsonl")
    assert not stopped["ok"] and stopped["error"] == "stopped after its limit of 0.01 s"
    assert not broken["ok"] and "IsADirectoryError" in str(broken["error"])
    assert fine["ok"] and (out / "tilings.json").is_file()
    assert "IsADirectoryError" in (out / "summary.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--parts", "check,nothing"],
            "--parts must be some of tests,check,tune,time,steps,train,adapt, got 'nothing'",
        ),
        (["--limit", "check=soon"], "--limit must be PART=SECONDS"),
    ],
)
def test_wrong_usage(tmp_path: Path, options: list[str], message: str):
    done, _ = gpu(tmp_path, *options)
    assert done.returncode == 2 and message in done.stderr

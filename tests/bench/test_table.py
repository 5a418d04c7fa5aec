"""`heedful bench kernels --write-table`."""

import json

import torch

from heedful.bench.kernels import Sizes
from heedful.bench.table import measure_implementations, write_entry
from heedful.bench.timing import timing
from heedful.cli import main
from heedful.ops.selective import choice

CPU = torch.device("cpu")


def test_hopeless_implementations_are_dropped(monkeypatch):
    def fake(cases, **_):
        speed = {"blocked": 1.0, "sdpa": 2.5, "reference": 4.0}
        return {name: timing(name, [speed[name.split()[0]]] * 2) for name in cases}

    monkeypatch.setattr("heedful.bench.table.interleaved", fake)
    monkeypatch.setattr("heedful.bench.table.available", lambda *_: (["blocked", "sdpa", "reference"], {}))
    result = measure_implementations(CPU, torch.float32, sizes=Sizes(2, 2, 8, 8), lengths=(16, 32))
    assert result == {
        "16": {"blocked": 2.0, "sdpa": 5.0, "reference": 8.0},
        "32": {"blocked": 2.0, "sdpa": 5.0},
    }


def test_other_entries_stay(tmp_path):
    path = tmp_path / "choice.json"
    write_entry(path, CPU, torch.float32, {"16": {"blocked": 0.123456}}, {"threads": 1})
    write_entry(path, CPU, torch.bfloat16, {"16": {"sdpa": 1.0}}, {"threads": 2})
    write_entry(path, CPU, torch.float32, {"32": {"blocked": 2.0}}, {"threads": 4})
    assert json.loads(path.read_text()) == {
        "cpu": {
            "float32": {"threads": 4, "seconds": {"32": {"blocked": 2.0}}},
            "bfloat16": {"threads": 2, "seconds": {"16": {"sdpa": 1.0}}},
        }
    }


def test_command(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(choice, "PATH", tmp_path / "choice.json")
    monkeypatch.setattr("heedful.bench.table.LENGTHS", (16, 32))
    flags = ["--heads", "2", "--head-dim", "8", "--seconds", "0.1", "--out", str(tmp_path)]
    assert main(["bench", "kernels", "--write-table", *flags]) == 0
    entry = json.loads((tmp_path / "choice.json").read_text())["cpu"]["float32"]
    assert list(entry["seconds"]) == ["16", "32"]
    assert {"blocked", "sdpa", "reference"} == set(entry["seconds"]["16"])
    assert entry["torch"] == torch.__version__
    assert entry["command"].startswith("heedful bench kernels --write-table")
    assert "T =    32" in capfd.readouterr().out

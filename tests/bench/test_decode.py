"""The benchmarks: what is timed computes what it says, and the command reports it."""

import json

import pytest
import torch
from torch.nn import functional as F

from heedful.bench.decode import LAYERS, bench_decode, decode_cases
from heedful.cli import main


def test_decode_cases_hold_what_they_say():
    cases = {
        case.name: case for case in decode_cases(64, [4], n_heads=4, n_kv_heads=2, head_dim=8, compiled=False)
    }
    assert set(cases) == {
        "plain SDPA, full cache",
        "selective, full cache",
        "plain SDPA, T/4 keys",
        "selective slots, T/4",
        "  of it choosing, T/4",
    }
    with torch.no_grad():
        for _ in range(3):
            for name, case in cases.items():
                outs = case.run()
                assert len(outs) == LAYERS
                for out in outs:
                    if "choosing" in name:
                        assert 1 <= int(out) < 16
                    else:
                        assert out.shape == (1, 4, 1, 8)
                        assert out.isfinite().all()
    assert cases["selective slots, T/4"].kept == 16
    assert {case.baseline for case in cases.values()} <= set(cases)


def test_slots_without_votes_are_plain_attention():
    from heedful.ops.selective.slots import attend_slots

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    positions, newest = torch.arange(9).expand(2, -1), torch.tensor([[3], [8]])
    out, _ = attend_slots(q, k, v, torch.zeros(2, 9), positions, newest, 8**-0.5)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_bench_decode_times_every_case():
    cases = decode_cases(32, [2], n_heads=2, head_dim=4, compiled=False)
    result = bench_decode(cases, turns=2)
    assert [case.name for case, _ in result] == [case.name for case in cases]


def test_command(tmp_path, capfd):
    flags = ["--context", "32,64", "--budget-share", "2", "--heads", "2", "--head-dim", "4", "--turns", "2"]
    assert main(["bench", "decode", *flags, "--no-compiled", "--out", str(tmp_path)]) == 0
    assert "$ heedful bench decode --context 32,64" in (tmp_path / "decode.txt").read_text()
    rows = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert [row["context"] for row in rows] == [32] * 5 + [64] * 5
    assert rows[0]["ratio_to_full"] == 1
    assert {len(row["samples"]) for row in rows} == {2}
    assert {row["threads"] for row in rows} == {1}
    assert all(row["cpu"] and row["command"].startswith("heedful bench decode") for row in rows)
    assert "one decoding step at 64 tokens" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heads", "0"], "--heads must be 1 or more, got 0"),
        (["--kv-heads", "3"], "--kv-heads must divide --heads 8, got 3"),
        (["--turns", "1"], "--turns must be 2 or more"),
        (["--context", "8", "--budget-share", "16"], "fewer than 2 tokens"),
        (["--context", "many"], "--context takes whole numbers separated by commas"),
        (["--device", "moon"], "--device moon"),
    ],
)
def test_wrong_usage(flags, message, capfd):
    assert main(["bench", "decode", *flags]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_benchmarks_are_listed(capfd):
    from heedful.cli.bench import BENCHMARKS

    for arguments in ([], ["--help"]):
        assert main(["bench", *arguments]) == 0
        out = capfd.readouterr().out
        assert all(f"  {name} " in out for name in BENCHMARKS)
    assert main(["bench", "kernel"]) == 2
    assert "unknown benchmark 'kernel'; did you mean 'kernels'?" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["kernels", "train", "prefill", "decode"])
def test_help_of_each(name, capfd):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", name, "--help"])
    out = capfd.readouterr().out
    assert f"heedful bench {name}" in out
    assert "--out" in out

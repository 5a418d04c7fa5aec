"""`heedful bench train` and `heedful bench prefill`."""

import json

import pytest
import torch

from heedful.attention.eviction import EvictingCache
from heedful.attention.tokens import Tokens
from heedful.bench.kernels import Sizes
from heedful.bench.models import (
    COMPILED,
    FORMS,
    MHA,
    SELECTIVE,
    ModelSizes,
    model_prefill_workload,
    train_workload,
)
from heedful.bench.prefill import prefill_workload, pruned, pruned_name
from heedful.cli import main
from heedful.ops.selective import selective_attention

CPU = torch.device("cpu")
SMALL = ModelSizes(n_layers=1, d_model=16, n_heads=2, vocab_size=32)


def test_a_training_step_trains():
    workload = train_workload(12, SMALL, CPU, torch.float32)
    assert [case.name for case in workload.cases] == list(FORMS)
    assert workload.tokens == 12
    for case in workload.cases:
        losses = [float(case.run()) for _ in range(30)]
        assert losses[-1] < losses[0], case.name
    plain, selective, memory, sas, _ = (case.flops for case in workload.cases)
    assert plain == selective == memory < sas


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step():
    workload = train_workload(12, SMALL, CPU, torch.float32, [MHA], compiled=True)
    plain, compiled = workload.cases
    assert compiled.name == plain.name + COMPILED
    for _ in range(3):
        torch.testing.assert_close(compiled.run(), plain.run())


def test_steps_under_autocast():
    for case in train_workload(12, SMALL, CPU, torch.bfloat16, [MHA, SELECTIVE]).cases:
        assert case.run().isfinite()


def test_flops_of_a_model():
    decoder = SMALL.config(8).to_decoder_config()
    assert SMALL.flops(8, context=4, logits=8) == 8 * decoder.flops_per_token(4)
    assert SMALL.flops(8, context=4, logits=8) - SMALL.flops(8, context=4, logits=1) == 7 * 2 * 32 * 16


def test_reading_under_a_budget_is_the_rule():
    q, k, v = Sizes(2, 2, 8, 8).draw(40, CPU, torch.float32)
    full, _ = selective_attention(q, k, v)
    torch.testing.assert_close(pruned(q, k, v, 40, 1)(), full)
    few = pruned(q, k, v, 6, 1)()
    torch.testing.assert_close(few[:, :, :6], full[:, :, :6])
    assert not torch.allclose(few, full, atol=1e-3)

    from heedful import build

    attention = build("mha", score="selective", d_model=16, n_heads=2, rope=False)
    cache, x = EvictingCache(6), torch.zeros(1, 1, 16)
    rows = []
    with torch.no_grad():
        for i in range(40):
            piece = [t[:, :, i : i + 1] for t in (q, k, v)]
            memory = {"k": piece[1], "v": piece[2]}
            rows.append(cache.attend(attention, Tokens(x, piece[0], memory, None, None)))
    torch.testing.assert_close(few, torch.cat(rows, dim=2))
    assert cache.kept == 6


def test_prefill_cases():
    workload = prefill_workload(64, 8, 1, Sizes(4, 2, 8, 8), CPU, torch.float32)
    names = [case.name for case in workload.cases]
    assert (names[0], names[-1], len(names)) == ("plain SDPA", pruned_name(8), 3)
    assert {case.run().shape for case in workload.cases} == {(1, 4, 64, 8)}
    assert workload.cases[-1].flops < workload.cases[0].flops
    everything = prefill_workload(64, 64, 1, Sizes(4, 2, 8, 8), CPU, torch.float32)
    assert everything.cases[-1].flops == everything.cases[0].flops


def test_whole_model_prefill():
    workload = model_prefill_workload(20, 4, SMALL, CPU, torch.float32)
    assert [case.name for case in workload.cases] == [MHA, SELECTIVE, "selective, budget 4"]
    assert {case.run().shape for case in workload.cases} == {(1, 1, 32)}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_command(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shape = ["--n-layers", "1", "--d-model", "16", "--n-heads", "2", "--vocab-size", "32"]
    flags = [*shape, "--lengths", "8,16", "--turns", "2", "--out", str(tmp_path)]
    assert main(["bench", "train", *flags]) == 0
    rows = read(tmp_path / "train.jsonl")
    assert [(row["length"], row["case"]) for row in rows] == [(t, name) for t in (8, 16) for name in FORMS]
    seconds = {(row["length"], row["case"]): row["seconds"] for row in rows}
    for row in rows:
        assert row["ratios"] == {MHA: pytest.approx(row["seconds"] / seconds[row["length"], MHA])}
        assert row["tokens_per_second"] == pytest.approx(row["length"] / row["seconds"])
        assert (row["n_layers"], row["d_model"], row["extra_bytes"] > 0) == (1, 16, True)
    out, err = capfd.readouterr()
    assert "vs MHA" in out
    assert "was allocated before the profiling started" not in err
    assert max(map(len, out.splitlines()[:-1])) <= 100
    assert (tmp_path / "train.png").stat().st_size > 10_000


def test_prefill_command(tmp_path, capfd):
    flags = ["--heads", "2", "--head-dim", "8", "--lengths", "32", "--budget", "8", "--turns", "2"]
    assert main(["bench", "prefill", *flags, "--model-lengths", "", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "prefill.jsonl")
    assert {(row["workload"], row["budget"]) for row in rows} == {("prefill", 8)}
    assert rows[-1]["case"] == pruned_name(8)
    assert rows[-1]["ratios"]["plain SDPA"] == pytest.approx(rows[-1]["seconds"] / rows[0]["seconds"])
    assert "vs SDPA" in capfd.readouterr().out
    assert (tmp_path / "prefill.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("train", ["--n-heads", "3"], "n_heads"),
        ("train", ["--d-model", "0"], "--d-model must be 1 or more, got 0"),
        ("train", ["--lengths", "0"], "--lengths needs whole numbers from 2 on"),
        ("train", ["--dtype", "fp16"], "dtype"),
        ("prefill", ["--budget", "1"], "--budget must be 2 or more, got 1"),
        ("prefill", ["--kv-heads", "3"], "--kv-heads must divide --heads 8, got 3"),
        ("prefill", ["--evict-every", "0"], "--evict-every must be 1 or more, got 0"),
        ("prefill", ["--model-lengths", "x"], "--model-lengths takes whole numbers separated by commas"),
    ],
)
def test_wrong_usage(command, flags, message, capfd):
    assert main(["bench", command, *flags]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1

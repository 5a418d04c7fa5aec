"""`heedful bench kernels`: the forms compute what they say, the figures follow from the times."""

import dataclasses
import json

import pytest
import torch

from heedful.bench.ceilings import Ceilings, measure_ceilings
from heedful.bench.forms import (
    CUDA_BACKENDS,
    NAIVE,
    TWIN,
    X_TRANSFORMERS,
    Unavailable,
    best_plain,
    check,
    forgetting,
    forgetting_reference,
    naive,
    named,
    ours,
    plain,
    plain_reference,
    with_backend,
)
from heedful.bench.kernels import (
    EVERY_KEY,
    Kernels,
    Sizes,
    read,
    trained,
    with_every_key,
)
from heedful.bench.timing import timing
from heedful.bench.workload import Case, Figures, Workload, measure
from heedful.cli import main
from heedful.ops.native import status
from heedful.ops.selective import limits
from heedful.ops.selective.auto_rule import choose

CPU = torch.device("cpu")
SMALL = Sizes(n_heads=4, n_kv_heads=2, head_dim=8, value_dim=8)


def qkv(sizes=SMALL, dtype=torch.float64, length=37):
    return sizes.draw(length, CPU, dtype)


def test_naive_is_the_reference_and_plain_is_plain():
    check(naive, ours("reference"), *qkv(dtype=torch.float32), gradients=True)
    check(plain, plain_reference, *qkv(), gradients=True)
    check(plain, plain_reference, *qkv(Sizes(4, 2, 8, 4)), gradients=True)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: plain(q, k, v),  # no selection at all
        lambda q, k, v: ours("reference")(q, k, v) + 1e-3,
        lambda q, k, v: ours("reference")(q, k, v.detach()) + 0 * v.sum(),  # right output, wrong gradient
        lambda q, k, v: ours("reference")(q, k, v) * torch.nan,
    ],
)
def test_a_baseline_that_computes_something_else_is_none(wrong):
    with pytest.raises(Unavailable, match="computes something else"):
        check(wrong, ours("reference"), *qkv(), gradients=True)


def test_forgetting_reference():
    q, k, v = qkv(Sizes(2, 2, 8, 8))
    gate, scale = 0.98, 8**-0.5
    row = q[0, 1, 5] @ k[0, 1, :6].T * scale
    decay = torch.tensor([gate ** (5 - j) for j in range(6)]).double().log()
    want = (row + decay).softmax(-1) @ v[0, 1, :6]
    torch.testing.assert_close(forgetting_reference(q, k, v)[0, 1, 5], want, rtol=1e-5, atol=1e-6)
    with pytest.raises(Unavailable, match="CUDA"):
        forgetting(CPU)


def test_the_fastest_backend_is_named(monkeypatch):
    assert best_plain(lambda form: lambda: None, CPU) == ("plain SDPA", plain)
    monkeypatch.setattr("heedful.bench.forms.interleaved", lambda cases, **_: fake(cases))
    seen = []

    def fake(cases):
        seen.extend(cases)
        return {name: timing(name, [float(len(name))] * 2) for name in cases}

    def run(form):
        def step():
            if form.args[1] == CUDA_BACKENDS["flash"]:
                raise RuntimeError("No available kernel")

        return step

    name, form = best_plain(run, torch.device("cuda"))
    assert seen == ["efficient", "cudnn"]  # flash cannot run
    assert name == "plain SDPA, cudnn"
    assert (form.func, form.args) == (with_backend, (plain, CUDA_BACKENDS["cudnn"]))


def test_flops_and_bytes():
    q, k, v = qkv(Sizes(2, 2, 8, 4), length=6)
    pairs = 6 * 7 / 2
    assert Sizes(2, 2, 8, 4).flops(6, "prefill") == 2 * 2 * pairs * (8 + 4)
    assert Sizes(2, 2, 8, 4).flops(6, "train") == 3 * 2 * 2 * pairs * (8 + 4)
    moved = 8 * (q.numel() + k.numel() + v.numel() + 2 * 6 * 4)
    assert Sizes(2, 2, 8, 4).bytes(6, "prefill", torch.float64) == moved
    assert Sizes(2, 2, 8, 4).bytes(6, "train", torch.float64) == 2 * moved


def test_read_takes_no_gradients_and_trained_takes_all():
    q, k, v = (x.requires_grad_() for x in qkv())
    assert not read(plain, q, k, v)().requires_grad
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    gradients = trained(lambda q, k, v: plain(q, k, v) * weight, q, k, v, [weight])()
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape, weight.shape]
    assert q.grad is None


def test_workload_holds_every_form():
    kernels = Kernels(SMALL, CPU, torch.float32, compiled=False)
    names = [
        "plain SDPA",
        TWIN,
        *([named("native")] if status().active else []),
        named("blocked"),
        named("sdpa"),
        EVERY_KEY,
        NAIVE,
        X_TRANSFORMERS,
    ]
    assert [name for name in kernels.forms if name != named("reference")] == names
    short = kernels.workload("train", 16, dense_up_to=16)
    assert set(names) <= {case.name for case in short.cases}
    long = kernels.workload("prefill", 32, dense_up_to=16)
    assert {TWIN, X_TRANSFORMERS} < {case.name for case in long.cases}
    assert NAIVE not in {case.name for case in long.cases}
    assert "--dense-up-to 32" in long.left_out[NAIVE]
    assert "CUDA" in long.left_out["fla, forgetting"]
    for case in short.cases:
        assert [g.shape[2] for g in case.run()] == [16] * 3
    assert kernels.picked(1024) == named("native" if status().active else "blocked")


def test_a_wrong_kernel_of_ours_is_an_error(monkeypatch):
    monkeypatch.setattr("heedful.bench.kernels.available", lambda *_: (["sdpa"], {}))
    monkeypatch.setattr("heedful.bench.kernels.ours", lambda impl: plain if impl == "sdpa" else ours(impl))
    with pytest.raises(RuntimeError, match="selective, sdpa computes something else: output"):
        Kernels(SMALL, CPU, torch.float32, compiled=False)


def test_ceilings():
    ceilings = measure_ceilings(CPU, torch.float32, shapes=((64, 64, 64), (256, 64, 32)))
    assert ceilings.gemm > 0
    assert ceilings.copy > 0
    assert ceilings.gemm_shape in ((64, 64, 64), (256, 64, 32))


def test_figures_follow_from_medians(monkeypatch):
    samples = {"plain": [2.0, 1.0, 9.0], "ours": [3.0, 5.0, 4.0]}
    monkeypatch.setattr(
        "heedful.bench.workload.interleaved",
        lambda cases, **_: {name: timing(name, samples[name]) for name in cases},
    )
    monkeypatch.setattr("heedful.bench.workload.peak_extra_bytes", lambda run, device: run())
    cases = [Case("plain", lambda: 10, flops=8.0, bytes=4.0), Case("ours", lambda: 20, flops=8.0, bytes=4.0)]
    workload = Workload("train", 4, tokens=12, cases=cases, baselines={"vs plain": "plain"})
    rows = measure(workload, Ceilings(16.0, 8.0, (1, 1, 1)), CPU)
    assert [row.timing.seconds for row in rows] == [2.0, 4.0]
    assert [row.ratios["plain"] for row in rows] == [1.0, 2.0]
    assert [row.tokens_per_second for row in rows] == [6.0, 3.0]
    assert [row.of_gemm for row in rows] == [4 / 16, 2 / 16]
    assert [row.of_copy for row in rows] == [2 / 8, 1 / 8]
    assert [row.extra_bytes for row in rows] == [10, 20]
    assert [row.extra_bytes for row in measure(workload, Ceilings(1, 1, (1, 1, 1)), CPU, memory=False)] == [
        None
    ] * 2


def figures(workload, length, case, seconds, extra=None):
    time = timing(case, [seconds, seconds])
    return Figures(workload, length, case, time, 0.0, 0.0, 0.0, 0.0, 0.0, extra, {})


FAST = ["--heads", "2", "--head-dim", "8", "--turns", "2", "--no-compiled"]


def test_command(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    flags = [*FAST, "--lengths", "16,32", "--out", str(tmp_path)]
    assert main(["bench", "kernels", *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    groups = {(row["workload"], row["length"]) for row in rows}
    works = ("prefill", "train")
    assert groups == {(w, t) for w in works for t in (16, 32)}
    for row in rows:
        assert row["seconds"] == pytest.approx(
            sorted(row["samples"])[0] / 2 + sorted(row["samples"])[1] / 2, rel=1e-4
        )
        assert row["extra_bytes"] > 0
        assert row["command"].startswith("heedful bench kernels --heads 2")
        assert row["torch"] == torch.__version__
        assert row["cpu"]
        assert (row["heads"], row["kv_heads"], row["dtype"], row["threads"]) == (2, 2, "fp32", 1)
    for group in groups:
        of_group = [row for row in rows if (row["workload"], row["length"]) == group]
        seconds = {row["case"]: row["seconds"] for row in of_group}
        for row in of_group:
            for name, ratio in row["ratios"].items():
                assert ratio == pytest.approx(row["seconds"] / seconds[name])
    picked = {row["case"] for row in rows if row["picked"]}
    tiles = {named(choose("cpu", t, t)) for t in (16, 32)}
    assert picked == ({named("native")} if status().active else tiles)
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    out, err = capfd.readouterr()
    assert "vs SDPA" in out
    assert "left out: fla, forgetting: its kernels need a CUDA device" in out
    assert max(map(len, out.splitlines()[:-1])) <= 100
    assert "kernels.png" in out.splitlines()[-1]
    assert "measuring train, T = 32" in err
    saved = (tmp_path / "kernels.txt").read_text()
    assert saved.startswith("$ heedful bench kernels --heads 2")
    assert "vs SDPA" in saved


def test_ctrl_c_keeps_the_rows(tmp_path, capfd, monkeypatch):
    from heedful.cli.bench import common

    real, calls = common.measure, []

    def interrupted(workload, *args, **kwargs):
        calls.append(workload.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(workload, *args, **kwargs)

    monkeypatch.setattr(common, "measure", interrupted)
    flags = [*FAST, "--lengths", "16", "--out", str(tmp_path)]
    assert main(["bench", "kernels", *flags]) == 130
    lines = (tmp_path / "kernels.jsonl").read_text().splitlines()
    assert {json.loads(line)["workload"] for line in lines} == {"prefill"}
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"the {len(lines)} rows measured so far are in {tmp_path / 'kernels.jsonl'}" in error


def test_ctrl_c_before_anything_leaves_an_earlier_file_alone(tmp_path, capfd, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("heedful.cli.bench.common.measure", stop)
    (tmp_path / "kernels.jsonl").write_text("earlier\n")
    assert main(["bench", "kernels", *FAST, "--lengths", "16", "--out", str(tmp_path)]) == 130
    assert (tmp_path / "kernels.jsonl").read_text() == "earlier\n"
    assert "interrupted before anything was measured" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "1"], "--lengths needs whole numbers from 2 on"),
        (["--lengths", "a"], "--lengths takes whole numbers separated by commas"),
        (["--heads", "0"], "--heads must be 1 or more, got 0"),
        (["--kv-heads", "3"], "--kv-heads must divide --heads 8, got 3"),
        (["--seconds", "0"], "--seconds must be more than 0, got 0.0"),
        (["--turns", "1"], "--turns must be 2 or more"),
        (["--threads", "0"], "--threads needs whole numbers from 1 on"),
        (["--threads", "many"], "--threads takes whole numbers separated by commas"),
        (["--dense-up-to", "-1"], "--dense-up-to must be 0 or more"),
        (["--device", "moon"], "--device moon"),
        (["--dtype", "int8"], "dtype"),
        (["--lenghts", "16"], "did you mean --lengths?"),
    ],
)
def test_wrong_usage(flags, message, capfd):
    assert main(["bench", "kernels", *flags]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_tables_fit_on_the_screen():
    import io

    from rich.console import Console

    from heedful.cli.bench.common import figures_table

    long = "naive, torch.compile"
    baselines = {"vs SDPA": "a", "vs twin": "b"}
    row = dataclasses.replace(
        figures("train", 16384, long, 9.999, 40_000_000_000),
        ratios={"a": 100.0, "b": 100.0},
        tokens_per_second=1e7,
        flops_per_second=6e14,
    )
    workload = Workload("train", 16384, 1, [], baselines)
    screen = io.StringIO()
    Console(file=screen, width=100).print(figures_table("title", workload, [row], long))
    assert "…" not in screen.getvalue()
    assert "too narrow" not in screen.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_keep_what_matters_on_any_screen(width):
    import io

    from rich.console import Console

    from heedful.cli.bench.common import figures_table

    long = "naive, torch.compile"
    row = dataclasses.replace(
        figures("train", 16384, long, 9.999, 40_000_000_000), ratios={"a": 1.23, "b": 4.56}
    )
    workload = Workload("train", 16384, 1, [], {"vs SDPA": "a", "vs twin": "b"})
    screen = io.StringIO()
    Console(file=screen, width=width).print(figures_table("title", workload, [row], width=width))
    shown = screen.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    for cell in (long, "9,999 ms", "1.23", "4.56", "vs SDPA", "vs twin"):
        assert cell in shown
    assert ("copy" in shown.split("narrow screen, left out:")[0]) == (width > 80)
    assert ("narrow screen, left out:" in shown) == (width <= 80)


def test_times_under_foreign_load_are_not_compared(tmp_path, capfd, monkeypatch):
    """They are written and shown, without ratios, without a plot; the first table is not disturbed."""
    answers = iter([None, "0.9 of 2 cores were busy with something else"])
    monkeypatch.setattr("heedful.bench.workload.interleaved", lambda cases, **_: fake(cases))

    def fake(cases):
        why = next(answers)
        return {name: dataclasses.replace(timing(name, [1.0, 2.0]), disturbed=why) for name in cases}

    (tmp_path / "kernels.png").write_bytes(b"of an earlier run")
    flags = [*FAST, "--lengths", "16", "--no-memory", "--out", str(tmp_path)]
    assert main(["bench", "kernels", *flags]) == 0
    out = capfd.readouterr().out
    prefill, train = out.split("train, T = 16")
    assert "1.00" in prefill and "foreign load" not in prefill
    assert "foreign load: 0.9 of 2 cores were busy with something else; no ratios" in " ".join(train.split())
    assert "1.00" not in train
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert {(row["workload"], bool(row["ratios"]), bool(row["disturbed"])) for row in rows} == {
        ("prefill", True, False),
        ("train", False, True),
    }
    assert not (tmp_path / "kernels.png").exists()
    assert "kernels.png" not in out


def test_every_key_is_kept_while_it_runs_and_not_afterwards():
    seen = []
    share = limits.MANY
    with_every_key(lambda: seen.append(limits.MANY))()
    with pytest.raises(ZeroDivisionError):
        with_every_key(lambda: 1 / 0)()
    assert (seen, limits.MANY) == ([0.0], share)

"""The table behind `impl="auto"`: well formed, and obeyed."""

import pytest
import torch

from heedful.ops.selective import api, choice, selective_attention
from heedful.ops.selective.api import IMPLEMENTATIONS
from heedful.ops.selective.choice import choose, rank, read_table


def test_the_table_is_well_formed():
    for device, dtypes in read_table().items():
        torch.device(device)
        for dtype, entry in dtypes.items():
            assert isinstance(getattr(torch, dtype), torch.dtype)
            assert {"cpu", "torch", "day", "threads", "command"} <= set(entry)
            lengths = [int(length) for length in entry["seconds"]]
            assert lengths == sorted(set(lengths))
            assert lengths
            for seconds in entry["seconds"].values():
                assert set(seconds) <= set(IMPLEMENTATIONS)
                assert seconds
                assert min(seconds.values()) > 0


def test_the_fastest_of_every_entry_is_chosen():
    entries = [(d, t, e) for d, dtypes in read_table().items() for t, e in dtypes.items()]
    assert ("cpu", "float32") in [(device, dtype) for device, dtype, _ in entries]
    for device, dtype, entry in entries:
        for length, seconds in entry["seconds"].items():
            fastest = min(seconds, key=seconds.__getitem__)
            if fastest != "triton":
                assert choose(device, getattr(torch, dtype), int(length), int(length)) == fastest


TABLE = {
    "cpu": {
        "float32": {
            "seconds": {
                "16": {"sdpa": 1.0, "blocked": 2.0},
                "64": {"sdpa": 1.0, "blocked": 2.0, "reference": 1.5},
                "256": {"sdpa": 3.0, "blocked": 2.0},
            }
        }
    }
}


@pytest.mark.parametrize(
    ("length", "n_keys", "expected"),
    [
        (1, 1, "sdpa"),
        (64, 64, "sdpa"),
        (128, 128, "sdpa"),  # as far from 64 as from 256
        (129, 128, "blocked"),
        (256, 256, "blocked"),
        (10_000, 10_000, "blocked"),
        (8, 4096, "blocked"),  # few queries, many keys
    ],
)
def test_the_nearest_entry_counts(monkeypatch, length, n_keys, expected):
    monkeypatch.setattr(choice, "RANKING", rank(TABLE))
    assert choose("cpu", torch.float32, length, n_keys) == expected


def test_what_cannot_run_is_passed_over(monkeypatch):
    monkeypatch.setattr(choice, "RANKING", rank(TABLE))
    assert choose("cpu", torch.float32, 64, 64, without=("sdpa",)) == "reference"
    assert choose("cpu", torch.float32, 16, 16, without=("sdpa",)) == "blocked"
    assert choose("cpu", torch.float32, 9, 9, without=("sdpa", "blocked", "triton")) == "reference"


def test_what_was_never_measured(monkeypatch):
    monkeypatch.setattr(choice, "RANKING", rank(TABLE))
    monkeypatch.setattr(choice, "_NO_TRITON", ())
    assert choose("cpu", torch.float64, 64, 64) == "blocked"
    assert choose("cuda", torch.bfloat16, 64, 64) == "triton"
    assert choose("cuda", torch.bfloat16, 64, 64, without=("triton",)) == "sdpa"
    assert choose("mps", torch.float32, 64, 64) == "sdpa"
    monkeypatch.setattr(choice, "_NO_TRITON", ("triton",))
    assert choose("cuda", torch.bfloat16, 64, 64) == "sdpa"


def test_choosing_compiles(monkeypatch):
    monkeypatch.setattr(choice, "RANKING", rank(TABLE))

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def step(x):
        return x + (1 if choose(x.device.type, x.dtype, x.shape[0], x.shape[0]) == "sdpa" else 2)

    assert [float(step(torch.zeros(n))[0]) for n in (8, 100, 128, 129, 2000)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("impl", ["reference", "sdpa", "blocked"])
def test_auto_obeys_the_table(monkeypatch, impl):
    other = "sdpa" if impl != "sdpa" else "reference"
    table = {"cpu": {"float32": {"seconds": {"8": {impl: 1.0, other: 2.0}}}}}
    monkeypatch.setattr(choice, "RANKING", rank(table))
    q, k, v = torch.randn(3, 1, 2, 8, 4).unbind(0)
    ran = []
    for names in (api.BLOCKED, api.DENSE):
        for name, run in names.items():

            def spy(*args, name=name, run=run):
                ran.append(name)
                return run(*args)

            monkeypatch.setitem(names, name, spy)
    selective_attention(q, k, v)
    assert ran == [impl]

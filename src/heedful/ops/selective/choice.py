"""What `impl="auto"` picks: the fastest implementation in a table of measurements, `choice.json`.

`heedful bench kernels --write-table` times every implementation, forward and backward together, and rewrites the
entries of its device and precision; the file says on which machine, when, and with which torch. A call whose
number of logits (queries times keys) lies between two entries takes the nearer one, by ratio.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("choice.json")
Table = dict[str, dict[str, dict[str, Any]]]
Ranking = list[tuple[int, list[str]]]


def read_table() -> Table:
    """Device type -> dtype -> where and when it was measured, and "seconds": T -> implementation -> seconds."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def rank(table: Table) -> dict[tuple[str, str], Ranking]:
    """Of each device and dtype, T and the implementations from the fastest on, by ascending T."""
    return {
        (device, dtype): sorted(
            (int(length), sorted(seconds, key=seconds.__getitem__))
            for length, seconds in entry["seconds"].items()
        )
        for device, dtypes in table.items()
        for dtype, entry in dtypes.items()
    }


# Read once, at import: torch.compile traces through `choose`, and files and caches would stop it.
RANKING = rank(read_table())
_UNMEASURED = {"cpu": ["blocked"], "cuda": ["triton"]}
_NO_TRITON = () if find_spec("triton") is not None else ("triton",)


def choose(
    device_type: str, dtype: torch.dtype, length: int, n_keys: int, without: tuple[str, ...] = ()
) -> str:
    """The implementation for `length` queries and `n_keys` keys.

    Where nothing was measured: "blocked" on the CPU; on CUDA "triton" where it is installed, else "sdpa"; "sdpa"
    elsewhere.

    Args:
        device_type: "cpu", "cuda", ...
        dtype: of the queries.
        length: T.
        n_keys: S.
        without: implementations that cannot run this call.
    """
    without = without + _NO_TRITON
    ranking = RANKING.get((device_type, str(dtype).removeprefix("torch.")), [])
    steps = _steps(ranking, without)
    if not steps:
        return _first([*_UNMEASURED.get(device_type, []), "sdpa", "blocked"], without) or "reference"
    for logits, impl in steps[:-1]:
        if length * n_keys <= logits:
            return impl
    return steps[-1][1]


def _steps(ranking: Ranking, without: tuple[str, ...]) -> list[tuple[int, str]]:
    """(logits up to which, implementation), ascending; neighbours that agree are one step."""
    steps: list[tuple[int, str]] = []
    before = 0
    for length, fastest in ranking:
        impl = _first(fastest, without)
        if impl is None:
            continue
        if steps:  # up to the geometric mean of the logits of both
            steps[-1] = (before * length, steps[-1][1])
        if steps and steps[-1][1] == impl:
            steps.pop()
        steps.append((0, impl))
        before = length
    return steps


def _first(implementations: list[str], without: tuple[str, ...]) -> str | None:
    for impl in implementations:
        if impl not in without:
            return impl
    return None

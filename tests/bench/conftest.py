"""Benchmarks of small sizes: what the machine can do is measured with small products too."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from heedful.bench import ceilings
from heedful.bench.load import LoadMeter


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 64 instead of 2048; tests of the ceilings themselves name their shapes."""
    measure: Callable[..., Any] = partial(ceilings.measure_ceilings, shapes=((64, 64, 64),))
    monkeypatch.setattr("heedful.cli.bench.common.measure_ceilings", measure)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 16)


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests share the machine with each other; the meter has tests of its own."""
    quiet = type("Quiet", (LoadMeter,), {"disturbance": lambda self: None})
    monkeypatch.setattr("heedful.bench.timing.LoadMeter", quiet)

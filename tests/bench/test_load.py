"""Timings under foreign load are found out."""

import os
import subprocess
import sys
import time

import pytest

from heedful.bench import load
from heedful.bench.load import LoadMeter


class Machine:
    """A clock, and CPU times that go with it."""

    def __init__(self, own: float, foreign: float, told: bool = True) -> None:
        self.now, self.share, self.foreign, self.told = 100.0, own, foreign, told

    def meter(self, threads: int, cores: int) -> LoadMeter:
        return LoadMeter(
            threads,
            clock=lambda: self.now,
            own=lambda: self.share * self.now,
            busy=lambda: (self.share + self.foreign) * self.now if self.told else None,
            cores=cores,
        )


@pytest.mark.parametrize(
    ("threads", "cores", "own", "foreign", "told", "says"),
    [
        (1, 2, 1.0, 0.05, True, None),
        (2, 2, 1.9, 0.05, True, None),
        (1, 64, 1.0, 5.0, True, None),  # a large machine does not feel that
        (1, 2, 1.0, 0.9, True, "0.9 of 2 cores were busy with something else"),
        (2, 2, 1.1, 0.9, True, "0.9 of 2 cores were busy with something else"),
        (1, 64, 1.0, 30.0, True, "30.0 of 64 cores were busy with something else"),
        (1, 2, 0.7, 0.1, True, "the process had a core for 70% of the time"),
        (1, 2, 0.7, 0.0, False, "the process had a core for 70% of the time"),
        (1, 2, 1.0, 0.9, False, None),
        (2, 2, 1.2, 0.0, False, None),  # of two threads one may wait for the other
    ],
)
def test_disturbance(threads: int, cores: int, own: float, foreign: float, told: bool, says: str | None):
    machine = Machine(own, foreign, told)
    meter = machine.meter(threads, cores)
    machine.now += 10
    assert meter.disturbance() == says


def test_the_system_is_read(tmp_path, monkeypatch: pytest.MonkeyPatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 9000 50 1 2 7 0 0\ncpu0 1 1 1 1\n")
    monkeypatch.setattr(load, "STAT", stat)
    assert load.busy_seconds() == 160 / os.sysconf("SC_CLK_TCK")
    stat.write_text("nothing\n")
    assert load.busy_seconds() is None
    monkeypatch.setattr(load, "STAT", tmp_path / "nowhere")
    assert load.busy_seconds() is None


def test_another_process_is_seen():
    """All cores busy with something else for a while: a real meter notices."""
    cores = os.cpu_count() or 1
    burn = "import time\nend = time.perf_counter() + 1.5\nwhile time.perf_counter() < end: pass"
    others = [subprocess.Popen([sys.executable, "-S", "-c", burn]) for _ in range(cores)]
    try:
        time.sleep(0.2)
        meter = LoadMeter(1)
        end = time.perf_counter() + 0.6
        while time.perf_counter() < end:
            pass
        assert meter.disturbance() is not None
    finally:
        for other in others:
            other.wait()

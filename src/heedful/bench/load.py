"""Whether something else worked on this machine while it was measured: such timings are no ground for a ranking."""

import os
import time
from collections.abc import Callable
from pathlib import Path

FOREIGN = 0.10
"""Share of all cores that may be busy with something else."""
STARVED = 0.10
"""Share of its time that the one thread that is measured may wait for a core."""

STAT = Path("/proc/stat")


def own_seconds() -> float:
    """CPU time of this process and of the children that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def busy_seconds() -> float | None:
    """CPU time of everything on this machine since it started, stolen time too; None where it is not told."""
    try:
        fields = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class LoadMeter:
    """Measures, from its making on, how busy the machine is with something else.

    Args:
        threads: that the measured work computes with.
        clock: wall time in seconds.
        own: CPU seconds of this process so far.
        busy: CPU seconds of all processes so far; None where the system does not tell.
        cores: of the machine.
    """

    def __init__(
        self,
        threads: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        own: Callable[[], float] = own_seconds,
        busy: Callable[[], float | None] = busy_seconds,
        cores: int | None = None,
    ) -> None:
        self.threads, self.cores = threads, cores or os.cpu_count() or 1
        self.clock, self.own, self.busy = clock, own, busy
        self.started, self.own_before, self.busy_before = clock(), own(), busy()

    def disturbance(self) -> str | None:
        """What disturbed the measurement since the meter was made; None if nothing did."""
        wall = max(self.clock() - self.started, 1e-9)
        own, busy = self.own() - self.own_before, self.busy()
        if busy is not None and self.busy_before is not None:
            foreign = (busy - self.busy_before - own) / wall
            if foreign > FOREIGN * self.cores:
                return f"{foreign:.1f} of {self.cores} cores were busy with something else"
        if self.threads == 1 and own < (1 - STARVED) * wall:
            return f"the process had a core for {own / wall:.0%} of the time"
        return None

"""The machine that something runs on: names, and what it has."""

import os
import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name() -> str:
    """What models are trained on here: the name of a GPU, or of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return cpu_name() if found is None else str(found)


def memory_bytes() -> int:
    """The main memory, or what a container may use of it."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            return min(most, int(limit.read()))
    except (OSError, ValueError):  # there is none, or it says "max"
        return most

"""The memory that a piece of work needs on top of what is there when it starts."""

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that are alive at once during `run()`, those from before not counted.

    What `run` makes and leaves behind, such as gradients, counts. Run it once before, so that what is made a
    single time does not. On the CPU every allocation of PyTorch is recorded by its profiler and added up; what
    libraries allocate for themselves is not seen. On an accelerator its allocator keeps the count.

    Args:
        run: the work.
        device: where its tensors are.

    Raises:
        RuntimeError: if the profiler recorded no allocation at all, as when `run` makes no tensors on `device`.
    """
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    if not changes:
        raise RuntimeError("no allocation was recorded; expected a run that makes tensors on the CPU")
    changes.sort(key=lambda change: change[0])
    return max(0, *accumulate(size for _, size in changes))

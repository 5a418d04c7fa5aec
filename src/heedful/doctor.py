"""What is active on this machine, and why: libraries, kernels, processor. It needs torch only."""

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import heedful
from heedful.machine import cpu_name
from heedful.ops.native.library import preferred
from heedful.ops.selective.auto_rule import choose
from heedful.ops.selective.triton import unavailable
from heedful.ops.selective.triton.available import trusted

OTHERS = ("triton", "numpy", "peft", "trl")  # installed or not, they matter

Report = dict[str, Any]


def examine() -> Report:
    """Everything, as plain data: `heedful`, `python`, `libraries`, `extras`, `cpu`, `gpu`, `kernels`, `caches`."""
    needed = _requirements()
    names = dict.fromkeys(["torch", *(name for names in needed.values() for name in names), *OTHERS])
    return {
        "heedful": {"version": heedful.__version__, "folder": str(Path(heedful.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "libraries": {name: _version(name) for name in names},
        "extras": {extra: _missing(extra, names) for extra, names in needed.items()},
        "cpu": _cpu(),
        "gpu": _gpu(),
        "kernels": _kernels(),
        "caches": _caches(),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, list[str]]:
    """Extra -> the distributions that it needs beyond other extras, from the metadata of the package."""
    extras: dict[str, list[str]] = {}
    try:
        lines = metadata.requires("heedful") or []
    except metadata.PackageNotFoundError:  # run from a folder without being installed
        lines = []
    for line in lines:
        found = re.match(r"([\w.-]+).*;.*extra == ['\"](\w+)['\"]", line)
        if found and found[1] != "heedful" and found[2] in ("lm", "bench", "tensorboard"):
            extras.setdefault(found[2], []).append(found[1])
    return extras


def _missing(extra: str, names: list[str]) -> Report:
    missing = [name for name in names if _version(name) is None]
    return {"missing": missing, "install": f'pip install "heedful[{extra}]"' if missing else None}


def _cpu() -> Report:
    return {
        "name": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": torch.backends.mkldnn.is_available(),
        "MKL": torch.backends.mkl.is_available(),
        "compiler": next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None),
    }


def _gpu() -> Report:
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        capability = [".".join(map(str, torch.cuda.get_device_capability(i))) for i in range(len(found))]
        return {"found": found, "capability": capability, "why": f"CUDA {torch.version.cuda}"}
    why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    return {"found": [], "capability": [], "why": why}


def _kernels() -> Report:
    """What implementations there are, and what `impl="auto"` takes for a few sizes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = (64, 256, 1024, 4096)
    tiny = torch.zeros(1, 1, 1, 32, device=device)
    return {
        "auto": {f"T = {n:,}": _auto(device, n) for n in lengths},
        "auto on": f"{device}, float32",
        "native": _native(),
        "triton": unavailable(tiny, tiny) or "available",
    }


def _auto(device: str, n: int) -> str:
    if n > 1 and preferred(device, torch.float32):
        return "native"
    head = torch.zeros(1, 1, 1, 32, device=device)
    return choose(device, n, n, trusted(head, head))


def _native() -> str:
    """The compiled operator for the CPU: in use, or why the tiles of `blocked` stand for it."""
    if importlib.util.find_spec("heedful.ops.native") is None:
        return "tiles: PyTorch's own operations; nothing is compiled"
    found = importlib.import_module("heedful.ops.native").status()
    return f"{'active' if found.active else 'tiles'}: {found.reason}"


def _caches() -> Report:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {
        "heedful": str(home / "heedful"),
        "Hugging Face": os.environ.get("HF_HOME") or str(home / "huggingface"),
        "offline": os.environ.get("HF_HUB_OFFLINE") == "1",
    }


def lines(report: Report) -> list[str]:
    """The report for a person: short lines, one fact each."""
    shown = [f"heedful {report['heedful']['version']} in {report['heedful']['folder']}"]
    shown.append(f"Python {report['python']['version']}, {report['python']['executable']}")
    shown += ["", "libraries"]
    shown += [f"  {name:<16} {version or '-'}" for name, version in report["libraries"].items()]
    shown += ["", "extras"]
    for extra, state in report["extras"].items():
        missing = (
            f"missing {', '.join(state['missing'])}: {state['install']}" if state["missing"] else "complete"
        )
        shown.append(f"  {extra:<16} {missing}")
    cpu, gpu, kernels = report["cpu"], report["gpu"], report["kernels"]
    omp = f" (OMP_NUM_THREADS={cpu['OMP_NUM_THREADS']})" if cpu["OMP_NUM_THREADS"] else ""
    libraries = [name for name in ("oneDNN", "MKL") if cpu[name]]
    shown += ["", "processor", f"  {cpu['name']}"]
    shown.append(f"  {cpu['threads']} of {cpu['cores']} cores used{omp}; vectors {cpu['vectors']}")
    shown.append(f"  products by {' and '.join(libraries) or 'neither oneDNN nor MKL'}")
    shown.append(
        f"  C++ compiler {cpu['compiler'] or 'none: torch.compile and the native operator need one'}"
    )
    shown += ["", "GPU"]
    shown += [f"  {name}, {version}" for name, version in zip(gpu["found"], gpu["capability"], strict=True)]
    shown.append(f"  {gpu['why']}" if gpu["found"] else f"  none: {gpu['why']}")
    shown += ["", f'selective attention, impl="auto" on {kernels["auto on"]}']
    shown += [f"  {size:<16} {impl}" for size, impl in kernels["auto"].items()]
    shown.append(f"  {'native':<16} {kernels['native']}")
    shown.append(f"  {'triton':<16} {kernels['triton']}")
    shown += ["", "folders"]
    shown += [f"  {name:<16} {folder}" for name, folder in report["caches"].items() if name != "offline"]
    if report["caches"]["offline"]:
        shown.append("  HF_HUB_OFFLINE=1: nothing is downloaded")
    return shown

"""Everything that wants a GPU, in at most 14 minutes on one H100; no network, nothing to install.

    PYTHONPATH=src python benchmarks/gpu.py                       # or: make gpu
    PYTHONPATH=src python benchmarks/gpu.py --parts check,time    # parts alone

Parts, each a process of its own with a time limit, so that none can take another with it:

    tests   tests/ops/test_triton.py and test_decay_flex.py, where pytest and hypothesis are installed
    check   every kernel against the formula in float64          -> checks.jsonl
    tune    other tilings, timed against those in tilings.py     -> tilings.json
    time    forward, training, prefill, decode; SDPA, FoX        -> timings.jsonl
    steps   training steps of models of 23M parameters           -> steps.jsonl
    train   two models of 30M parameters, half a minute each     -> train.jsonl
    adapt   a checkpoint of 1B parameters learns to forget       -> adapt.jsonl

The results go to $OUT, or results/gpu, in a folder DATE-DEVICE with environment.json, parts.jsonl, summary.md and
a log of each part. The exit code is 1 if a part failed. `--device cpu --tiny` tries all of it in Triton's
interpreter, where no figure means anything.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "src"), str(HERE)]

# seconds, 830 in all
LIMITS = {
    "tests": 150.0,
    "check": 200.0,
    "tune": 80.0,
    "time": 80.0,
    "steps": 100.0,
    "train": 100.0,
    "adapt": 120.0,
}
LAST_LINES = 40


def environment(device: str, tiny: bool) -> dict[str, Any]:
    """What ran, on what."""
    import torch

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    found: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu {platform.machine()}",
        "interpreted": device != "cuda",
        "tiny": tiny,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        **{name: version(name) for name in ("torch", "triton", "transformers", "flash-linear-attention")},
        "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "uncommitted": bool(_said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = [properties.major, properties.minor]
        found["memory_bytes"] = properties.total_memory
        asked = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit"
        found["nvidia_smi"] = _said("nvidia-smi", asked, "--format=csv")
    return found


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def run_part(part: str, out: Path, device: str, tiny: bool, limit: float) -> dict[str, Any]:
    """Run one part in a process of its own: what became of it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run", part, "--folder", str(out)]
    command += ["--device", device, "--limit", f"{part}={limit}"] + ["--tiny"] * tiny
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    env["TRITON_INTERPRET"] = "0" if device == "cuda" else "1"
    started, error = time.monotonic(), None
    with (out / f"{part}.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except BaseException as stopped:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            error = f"stopped after its limit of {limit:g} s"
        else:
            if code:
                log.seek(0)
                error = "".join(log.readlines()[-LAST_LINES:]) or f"exit code {code}"
    return {
        "part": part,
        "ok": error is None,
        "seconds": round(time.monotonic() - started, 1),
        "error": error,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(LIMITS), help="some of %(default)s")
    parser.add_argument(
        "--out", type=Path, help="where the folder of results goes; default $OUT or results/gpu"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for the interpreter")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="PART=SECONDS", help="another time limit"
    )
    parser.add_argument("--run", choices=LIMITS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    limits = {part: seconds * (5 if chosen.tiny else 1) for part, seconds in LIMITS.items()}
    for given in chosen.limit:
        name, _, seconds = given.partition("=")
        if name not in LIMITS or not re.fullmatch(r"\d+(\.\d+)?", seconds):
            parser.error(f"--limit must be PART=SECONDS with a part of {', '.join(LIMITS)}, got {given!r}")
        limits[name] = float(seconds)
    parts = chosen.parts.split(",")
    if unknown := [part for part in parts if part not in LIMITS]:
        parser.error(f"--parts must be some of {','.join(LIMITS)}, got {unknown[0]!r}")
    if chosen.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU; to try the script without one, add --device cpu --tiny")
    if chosen.device == "cpu" and not chosen.tiny:
        parser.error("--device cpu is the interpreter, which takes hours at full size; add --tiny")
    if chosen.run:
        from gpu_parts.common import Run

        run = Run(chosen.folder, chosen.device, chosen.tiny, limits[chosen.run])
        import_module(f"gpu_parts.{chosen.run}").main(run)
        return 0

    from gpu_parts.summary import summary

    found = environment(chosen.device, chosen.tiny)
    where = chosen.out or Path(os.environ.get("OUT") or ROOT / "results" / "gpu")
    device = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    out = where / f"{found['time'][:10]}-{device}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    done = []
    for part in parts:
        print(f"{part} (at most {limits[part]:g} s) ...", flush=True)
        done.append(run_part(part, out, chosen.device, chosen.tiny, limits[part]))
        last = done[-1]
        print(
            "  done" if last["ok"] else f"  FAILED\n{last['error']}", f"after {last['seconds']} s", flush=True
        )
        lines = [json.dumps(row) for row in done]
        (out / "parts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (out / "summary.md").write_text(summary(out), encoding="utf-8")
    print(f"results in {out}")
    failed = [row["part"] for row in done if not row["ok"]]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

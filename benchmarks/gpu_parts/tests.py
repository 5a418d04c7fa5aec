"""The tests of the kernels, by pytest where it is installed; `check` needs no pytest."""

import os
import subprocess
import sys
from importlib.util import find_spec

from gpu_parts.common import Run


def main(run: Run) -> None:
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        print(f"not run: {' and '.join(missing)} not installed; the part `check` tries the kernels without")
        return
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/ops/test_triton.py"]
    command += [] if run.tiny else ["tests/ops/test_decay_flex.py"]
    command += ["-k", "next_slot"] if run.tiny else []
    if find_spec("xdist") and not run.tiny:  # compiling takes most of the time
        command += ["-n", str(max(1, (os.cpu_count() or 1) - 1))]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET" or run.tiny}
    code = subprocess.run(command, env=env).returncode
    if code:
        raise SystemExit(f"pytest ended with {code}")

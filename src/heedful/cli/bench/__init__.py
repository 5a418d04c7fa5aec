"""`heedful bench`: speed, as ratios of runs that take turns."""

import importlib
import os
from collections.abc import Sequence

from heedful.cli.errors import UsageError
from heedful.cli.wrapping import wrapped
from heedful.ops.checks import did_you_mean

BENCHMARKS = {
    "kernels": "attention alone: selective attention against plain, naive and other people's forms",
    "train": "a training step of a whole model, per attention and score",
    "prefill": "reading a long prompt, with and without a budget of tokens",
    "decode": "the attention part of one decoding step over a cache of slots",
}

USAGE = """Measure speed: cases that take turns in one process, as ratios of their medians.

usage: heedful bench BENCHMARK [options]
       heedful bench BENCHMARK --help

benchmarks:
{benchmarks}

Each prints tables and writes its raw figures, a JSON line per case, and, but for decode, a plot. What is compared
is checked to compute the same. `make bench` reproduces the published figures."""


def run(arguments: Sequence[str]) -> int:
    """Run a benchmark, or list them."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        width = max(map(len, BENCHMARKS))
        listed = "\n".join(f"  {n:<{width}}  {t}" for n, t in BENCHMARKS.items())
        print(wrapped(USAGE.format(benchmarks=listed)))
        return 0
    if name not in BENCHMARKS:
        hint = did_you_mean(name, BENCHMARKS)
        raise UsageError(f"unknown benchmark {name!r}; {hint}benchmarks: {', '.join(BENCHMARKS)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that adds up memory talks on stderr
    return importlib.import_module(f"heedful.cli.bench.{name}").run(arguments[1:])

"""Speed, as ratios of runs that were interleaved in one process."""

from heedful.bench.timing import Timing, interleaved

__all__ = ["Timing", "interleaved"]

"""What `impl="auto"` picks for more than one query.

Measured on an Intel Xeon, one thread, 8 heads of 64 in float32, a forward pass plus a training step: "sdpa"
took 1.6 ms against 2.4 of "blocked" at T = 64 and 3.2 against 3.7 at 128, but 20 against 9.5 at 256 and 155 against
24 at 512 (raw data: `ops/selective/choice.json` before this file replaced it, commit ac40d68). Other head sizes and
thread counts are not measured yet; `benchmarks/auto_rule.py` does it, on a quiet machine.
"""

SHORT = 128**2
"""Logits of a head up to which all of them fit a core's cache together, and tiles only add calls."""


def choose(device_type: str, length: int, n_keys: int) -> str:
    """The implementation for `length` queries and `n_keys` keys.

    Args:
        device_type: "cpu", "cuda", ...
        length: T.
        n_keys: S.
    """
    if device_type != "cpu":
        # On CUDA too: no GPU run stands in results/ yet that shows the Triton kernels faster.
        return "sdpa"
    return "sdpa" if length * n_keys <= SHORT else "blocked"

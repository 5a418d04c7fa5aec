"""What `impl="auto"` picks for more than one query. Measured in `results/auto`, by `benchmarks/auto_rule.py`."""

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

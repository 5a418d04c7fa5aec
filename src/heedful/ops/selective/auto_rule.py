"""What `impl="auto"` picks for more than one query, where the C++ operator is not to be had.

Where it is, on a CPU and but for float64, `auto` is "native" and this rule is not asked: it was the fastest form in
111 of 112 cases (head sizes 16 to 128, T 64 to 4,096, prefill and training, 1 and 2 threads of an AMD EPYC), by a
factor of 1.7 in the median; in the other it took 1.07 of the fastest. Of the two others "sdpa" was the faster
in all 32 cases up to T = 128 and in 10 of 16 at 256, "blocked" in 12 of 16 at 512 and wherever both were measured
beyond. Raw data: results/auto, from `benchmarks/auto_rule.py`.

On CUDA it is "triton" where the kernels can run and agreed with the formula: forward it took 0.17 to 0.21 of the
time of "sdpa" at T = 1,024 (head sizes 64 and 128, bfloat16, H200), in training 0.22 to 0.29, before its gradient
of the selection heads became float32, and it holds no (T, S) tensor. Raw data: results/gpu.
"""

SHORT = 256**2
"""Logits of a head up to which tiles only add calls."""


def choose(device_type: str, length: int, n_keys: int, kernels: bool = False) -> str:
    """The implementation for `length` queries and `n_keys` keys.

    Args:
        device_type: "cpu", "cuda", ...
        length: T.
        n_keys: S.
        kernels: whether the Triton kernels are trusted with these tensors (`triton.available.trusted`).
    """
    if device_type != "cpu":
        return "triton" if kernels and device_type == "cuda" else "sdpa"
    return "sdpa" if length * n_keys <= SHORT else "blocked"

"""Small C++ operators for the CPU: compiled on first use, cached, and checked before they are trusted.

Where they cannot be had, `impl="auto"` takes PyTorch's operations instead, says so once through `logging`, and
`status()` says why; `impl="native"` raises. `HEEDFUL_NATIVE=0` switches them off.
"""

from heedful.ops.native.library import Status, Unavailable, status

__all__ = ["Status", "Unavailable", "status"]

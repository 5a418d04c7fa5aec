"""A small C++ operator for the CPU: compiled on first use, cached, and checked before it is trusted.

Where it cannot be had, `impl="auto"` takes the tiles of `blocked`, says so once through `logging`, and `status()`
says why; `impl="native"` raises. `HEEDFUL_NATIVE=0` switches it off.
"""

from heedful.ops.selective.native.library import Status, Unavailable, check_with, status
from heedful.ops.selective.native.verify import check

check_with(check)

__all__ = ["Status", "Unavailable", "status"]

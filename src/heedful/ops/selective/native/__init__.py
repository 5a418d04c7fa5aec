"""Selective attention by the C++ operators of `heedful.ops.native`."""

from heedful.ops.native.library import check_with
from heedful.ops.selective.native.verify import check

check_with(check)

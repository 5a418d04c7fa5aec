"""A fair comparison of attention forms: same data order, same seeds, matched size, honest spread.

The settings need torch only; the rest loads on first use.
"""

from typing import TYPE_CHECKING

from heedful.lazy import lazy_names

if TYPE_CHECKING:
    from heedful.comparison.matching import match_d_ff
    from heedful.comparison.run import compare
    from heedful.comparison.settings import CompareSettings
    from heedful.comparison.table import FormSummary, summarise

_HOMES = {
    "heedful.comparison.matching": ("match_d_ff",),
    "heedful.comparison.run": ("compare",),
    "heedful.comparison.settings": ("CompareSettings",),
    "heedful.comparison.table": ("FormSummary", "summarise"),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)

__all__ = ["CompareSettings", "FormSummary", "compare", "match_d_ff", "summarise"]

"""A fair comparison of attention forms: same data order, same seeds, matched size, honest spread."""

from heedful.compare.matching import match_d_ff
from heedful.compare.run import CompareSettings, compare
from heedful.compare.table import FormSummary, summarise

__all__ = ["CompareSettings", "FormSummary", "compare", "match_d_ff", "summarise"]

"""Teaching a converted model whom to forget. The settings need torch only; the rest loads on first use."""

from typing import TYPE_CHECKING

from heedful.lazy import lazy_names

if TYPE_CHECKING:
    from heedful.adaptation.result import AdaptResult
    from heedful.adaptation.run import adapt
    from heedful.adaptation.settings import AdaptSettings

_HOMES = {
    "heedful.adaptation.result": ("AdaptResult",),
    "heedful.adaptation.run": ("adapt",),
    "heedful.adaptation.settings": ("AdaptSettings",),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)

__all__ = ["AdaptResult", "AdaptSettings", "adapt"]

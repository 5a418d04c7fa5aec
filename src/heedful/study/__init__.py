"""Studies: a claim, declared before it is tried, and what came out. One config file and one command each."""

from typing import TYPE_CHECKING

from heedful.lazy import lazy_names

if TYPE_CHECKING:
    from heedful.study.plan import Study, load_study
    from heedful.study.run import run_study

_HOMES = {
    "heedful.study.plan": ("Study", "load_study"),
    "heedful.study.run": ("run_study",),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)

__all__ = ["Study", "load_study", "run_study"]

"""Training through transformers' Trainer. The settings need torch only; the rest loads on first use."""

from typing import TYPE_CHECKING

from heedful.lazy import lazy_names

if TYPE_CHECKING:
    from heedful.errors import Interrupted
    from heedful.training.measured import HeldOut, held_out
    from heedful.training.result import RunResult
    from heedful.training.run import train
    from heedful.training.settings import ModelSettings, TrainSettings

_HOMES = {
    "heedful.errors": ("Interrupted",),
    "heedful.training.measured": ("HeldOut", "held_out"),
    "heedful.training.result": ("RunResult",),
    "heedful.training.run": ("train",),
    "heedful.training.settings": ("ModelSettings", "TrainSettings"),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)

__all__ = ["HeldOut", "Interrupted", "ModelSettings", "RunResult", "TrainSettings", "held_out", "train"]

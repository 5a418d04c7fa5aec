"""Training through transformers' Trainer."""

from heedful.errors import Interrupted
from heedful.training.held_out import HeldOut, held_out
from heedful.training.result import RunResult
from heedful.training.run import train
from heedful.training.settings import ModelSettings, TrainSettings

__all__ = ["HeldOut", "Interrupted", "ModelSettings", "RunResult", "TrainSettings", "held_out", "train"]

"""Training through transformers' Trainer."""

from heedful.training.result import RunResult
from heedful.training.run import Interrupted, train
from heedful.training.settings import ModelSettings, TrainSettings

__all__ = ["Interrupted", "ModelSettings", "RunResult", "TrainSettings", "train"]

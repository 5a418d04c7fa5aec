"""What a trained model is worth: loss, bits per byte, answers."""

from heedful.evaluation.loss import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]

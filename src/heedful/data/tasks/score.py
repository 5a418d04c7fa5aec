"""How many answers are right."""

from torch import Tensor

from heedful.data.packing import IGNORE


def answer_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of labelled tokens that are the argmax of the logits one position before.

    Args:
        logits: (batch, tokens, vocab).
        labels: (batch, tokens), -100 where nothing is asked.

    Raises:
        ValueError: the shapes disagree or nothing is labelled.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            "logits must be (batch, tokens, vocab) with the batch and tokens of labels "
            f"{tuple(labels.shape)}, got {tuple(logits.shape)}"
        )
    asked = labels[:, 1:] != IGNORE
    if not asked.any():
        raise ValueError("nothing to score: every label after the first column is -100")
    right = logits[:, :-1].argmax(dim=-1) == labels[:, 1:]
    return right[asked].double().mean().item()

"""Training that diverged: where, in which term, and what to change."""

from typing import Any

import torch
from torch import Tensor

LARGE_MEMORY_LOSS, SMALL_TAU = 1e3, 1e-3
"""Where a memory loss is far from what trains: its own size, and the votes at which a token counts as gone."""


def lost_terms(loss: Tensor, logits: Tensor, memory_loss: Tensor | None) -> str | None:
    """Which terms of a loss are not finite, in words; None: it is finite.

    Args:
        loss: all of it, one number.
        logits: what the task loss is made of.
        memory_loss: the part of the loss that is one; None: there is none.
    """
    if torch.isfinite(loss):
        return None
    terms = {}
    if memory_loss is not None and not torch.isfinite(memory_loss):
        terms["memory loss"] = memory_loss.item()
    if not terms or not torch.isfinite(logits).all():
        terms = {"task loss": torch.nan if terms else loss.item(), **terms}
    return " and ".join(f"the {name} is {value}" for name, value in terms.items())


def diverged(where: str, what: str, advice: str) -> ValueError:
    """The error, in one line."""
    return ValueError(f"training diverged {where}: {what}; {advice}")


def advice_for(lr: float, weight_decay: float, score_options: Any, memory_loss: Tensor | None = None) -> str:
    """What to change, by what is out of proportion.

    Args:
        lr: the peak learning rate.
        weight_decay: what it is multiplied with.
        score_options: of the model's score, or a list of them.
        memory_loss: the last one.
    """
    if lr < 1 <= lr * weight_decay:
        return (
            f"try a lower --weight-decay than {weight_decay:g}: times --lr {lr:g} it takes away more of a weight "
            f"than there is"
        )
    several = score_options if isinstance(score_options, list) else [score_options or {}]
    for own in several:
        weight, tau = own.get("memory_loss", 0.0), own.get("memory_tau", 1.0)
        overflowed = memory_loss is not None and bool(torch.isinf(memory_loss))
        if weight and (overflowed or weight > LARGE_MEMORY_LOSS or tau < SMALL_TAU):
            return f"try a smaller --score.memory-loss than {weight:g} or a larger --score.memory-tau than {tau:g}"
    return f"try a lower --lr than {lr:g}"

"""Initialisation that leaves already loaded weights alone."""

import torch
from torch import Tensor


def fill_(weight: Tensor, value: Tensor) -> None:
    """Copy `value` into a parameter.

    Model loaders mark the parameters that a checkpoint has already filled and guard `torch.nn.init`
    with that mark; a plain copy must respect it too, or a reload would silently reset the weights.
    """
    if not getattr(weight, "_is_hf_initialized", False):
        with torch.no_grad():
            weight.copy_(value)

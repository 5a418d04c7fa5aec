"""Which parameters weight decay may touch."""

from typing import Any

from torch import nn

from heedful.attention.base import Attention
from heedful.attention.score import Score

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def decayed_names(module: nn.Module) -> list[str]:
    """The names of the parameters that weight decay may touch: matrices that hold no identity map."""
    kept = {
        id(p) for m in module.modules() if isinstance(m, Attention | Score) for p in m.identity_parameters()
    }
    kept |= {id(p) for m in module.modules() if isinstance(m, NORMS) for p in m.parameters()}
    return [
        name
        for name, p in module.named_parameters()
        if p.ndim > 1 and id(p) not in kept and not name.rsplit(".", 1)[-1].startswith("bias")
    ]


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: no decay on norms, biases and the identity part of SAS.

    Args:
        module: any module; every parameter that requires a gradient is in exactly one group.
        weight_decay: of the first group; the second has 0.

    Returns:
        Two groups for a torch optimizer, e.g. `torch.optim.AdamW(param_groups(model, 0.1))`.

    Raises:
        ValueError: if `weight_decay` is negative.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be 0 or more, got {weight_decay}")
    names = set(decayed_names(module))
    parameters = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in parameters if n in names], "weight_decay": weight_decay},
        {"params": [p for n, p in parameters if n not in names], "weight_decay": 0.0},
    ]

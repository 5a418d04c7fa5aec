"""How large a QK-norm of the source lets a query or a key become."""

from torch import Tensor, nn


def largest_norm(norm: nn.Module | None) -> Tensor | None:
    """A bound on the length of what a norm over one head gives, from its gains; None where there is no such bound.

    An RMS norm gives sqrt(D) times its gains at most; what a rotation stretches comes on top. A norm over all heads
    together bounds each head no better. Gemma's gains are 1 + weight.
    """
    weight = getattr(norm, "weight", None)
    if norm is None or not isinstance(weight, Tensor) or not type(norm).__name__.endswith("RMSNorm"):
        return None
    gains = 1.0 + weight.float() if type(norm).__name__.startswith("Gemma") else weight.float()
    return gains.abs().max() * weight.numel() ** 0.5

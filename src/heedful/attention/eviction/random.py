"""Evict anything: the control."""

from torch import Tensor

from heedful.attention.eviction.policy import Policy, register_policy


@register_policy
class RandomPolicy(Policy):
    """A fixed pseudo-random score per position, the same for every way of running the tokens."""

    name = "random"

    def start(self, positions: Tensor) -> Tensor:
        """A hash of the position, in [0, 1)."""
        mixed = (positions * 2654435761 + 374761393) % 4294967296
        mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 4294967296
        return ((mixed ^ (mixed >> 13)) % 16777216).float() / 16777216

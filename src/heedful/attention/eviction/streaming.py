"""Keep the first tokens and a window of the last ones."""

import torch
from torch import Tensor

from heedful.attention.eviction.policy import Policy, register_policy


@register_policy
class StreamingPolicy(Policy):
    """StreamingLLM: four attention sinks at the start and a sliding window. Xiao et al., arXiv 2309.17453.

    Positions stay those of the text, where the paper counts them inside the cache. With a budget of four or
    less the sinks give way, oldest last.
    """

    name = "streaming"
    sinks = 4

    def start(self, positions: Tensor) -> Tensor:
        """The older, the sooner; the sinks last."""
        # in steps that float32 tells apart at 1e9
        return torch.where(positions < self.sinks, 1e3 * positions - 1e9, -positions.float())

"""Keep the heavy hitters and the recent half."""

import torch
from torch import Tensor

from heedful.attention.eviction.policy import Policy, register_policy


@register_policy
class H2OPolicy(Policy):
    """H2O: tokens that received little attention so far go; half the budget is the most recent tokens.

    Zhang et al., arXiv 2306.14048. The paper evicts per head; here the attention of all heads of the layer is
    summed and a token is dropped for all of them.
    """

    name = "h2o"
    needs_weights = True

    def update(self, scores: Tensor, weights: Tensor, newest: Tensor) -> Tensor:
        """Accumulate, negated: little attention means a high score."""
        return scores - weights.sum(1)

    def priority(self, scores: Tensor, positions: Tensor, newest: Tensor, budget: int) -> Tensor:
        """The recent half is safe while anything else is left."""
        return torch.where(newest - positions < budget // 2, scores - 1e9, scores)

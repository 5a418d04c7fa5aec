"""Keep what the last query looked at."""

from torch import Tensor

from heedful.attention.eviction.policy import Policy, register_policy


@register_policy
class TOVAPolicy(Policy):
    """TOVA: the token to which the latest query paid least attention goes. Oren et al., arXiv 2401.06104.

    The weights are averaged over the heads of the layer, and a token is dropped for all of them, which is the
    paper's own variant per layer.
    """

    name = "tova"
    needs_weights = True

    def update(self, scores: Tensor, weights: Tensor, newest: Tensor) -> Tensor:
        """The latest query alone counts."""
        return -weights.mean(1)

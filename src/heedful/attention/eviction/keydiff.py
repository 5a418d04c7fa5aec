"""Keep the keys that differ."""

from torch import Tensor

from heedful.attention.eviction.policy import Policy, register_policy
from heedful.ops.precision import wide_dtype


@register_policy
class KeyDiffPolicy(Policy):
    """KeyDiff: the key that is most like the others goes. Park et al., arXiv 2504.15364.

    It is the one with the largest cosine to the mean of the normalised keys that were held before the new token
    came, rotated as they are; no query is looked at. The paper evicts once for each block of a prompt, and each
    key head for itself. Here one token goes at a time, for all key heads of the layer, by the mean of their
    cosines. It protects nobody: give it a grace window, or the newest tokens may go before they are of use.
    """

    name = "keydiff"
    needs_keys = True

    def rate(self, keys: Tensor, held: Tensor) -> Tensor:
        """The cosine with the mean direction."""
        keys = keys.to(wide_dtype(keys))
        size = keys.norm(dim=-1).clamp_min(1e-12)  # (B, G, S)
        mean = (held[:, None] / size)[:, :, None] @ keys  # (B, G, 1, D), its length does not matter
        mean = mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return ((keys @ mean.mT)[..., 0] / size).mean(1)

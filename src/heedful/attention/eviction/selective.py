"""Evict the token with the most votes against it: context pruning of selective attention."""

from heedful.attention.eviction.policy import Policy, register_policy


@register_policy
class SelectivePolicy(Policy):
    """The score of a token is its F. Leviathan et al., arXiv 2410.02703, section 4."""

    name = "selective"
    ranks_by = "soft_mask"

"""A certified bound on what evictions have cost."""

from typing import NamedTuple

import torch
from torch import Tensor


class LossBound(NamedTuple):
    """What was evicted, and how large logits can be: a value, replaced with every eviction.

    A key with F votes against it weighs at most exp(2m - F) for every later query, if no logit exceeds m in
    size: the query itself has F = 0. The sum over keys is kept as a logarithm, since exp(2m) overflows where the
    product does not.
    """

    log_lost: Tensor
    """(B, 1), the logarithm of the sum of exp(-F) over the evicted keys."""
    sizes: Tensor
    """(B, 2), the largest sizes of queries and of keys; apart, as a query may meet any evicted key."""

    @classmethod
    def nothing_lost(cls, batch: int, dtype: torch.dtype, device: torch.device) -> "LossBound":
        """The bound before any eviction."""
        log_lost = torch.full((batch, 1), -torch.inf, dtype=dtype, device=device)
        return cls(log_lost, torch.zeros(batch, 2, dtype=dtype, device=device))

    def evicted(self, gone: Tensor, soft_mask: Tensor) -> "LossBound":
        """With the tokens that are `gone`, (B, S) bool, of F at their eviction, (B, S)."""
        cost = (-soft_mask).masked_fill(~gone, -torch.inf).logsumexp(-1, keepdim=True)
        return self._replace(log_lost=torch.logaddexp(self.log_lost, cost.to(self.log_lost.dtype)))

    def met(self, sizes: Tensor) -> "LossBound":
        """With queries and keys of these sizes, (B, 2)."""
        return self._replace(sizes=torch.maximum(self.sizes, sizes.to(self.sizes.dtype)))

    def mass(self) -> Tensor:
        """(B,), at most this share of the attention of any query was lost."""
        m = self.sizes.prod(-1, keepdim=True)
        return (2 * m + self.log_lost).clamp(max=0.0).exp()[:, 0]

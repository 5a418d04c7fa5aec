"""Keep what the last queries looked at, and what stands beside it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.attention.eviction.policy import Policy, register_policy

_SAFE = -1e9  # far below any attention: the last to go


@register_policy
class SnapKVPolicy(Policy):
    """SnapKV: the token to which the latest queries paid least attention goes. Li et al., arXiv 2404.14469.

    The attention of a window of 32 queries is summed, then averaged over five neighbours in order of position.
    The window's own tokens are no neighbours, and stay while anything else is left.

    The paper compresses a prompt once, after its last query, and each head keeps tokens of its own. Here the
    rule is stepwise: the window moves on with each token that arrives; its queries attended to what was held at
    their time; neighbours are those still held; and the attention of all heads of the layer is summed, a token
    goes for all of them. A budget of less than twice the window has a window of half the budget. A held token
    costs 32 more numbers.
    """

    name = "snapkv"
    needs_weights = True
    window = 32
    kernel = 5

    def start(self, positions: Tensor) -> Tensor:
        """(B, W, T), nothing yet; query i writes into row i mod W."""
        return torch.zeros(positions.shape[0], self.window, positions.shape[1], device=positions.device)

    def update(self, scores: Tensor, weights: Tensor, newest: Tensor) -> Tensor:
        """The query takes the row of the one that leaves the window."""
        row = (newest % self.window)[..., None].expand(-1, -1, scores.shape[-1])
        return scores.scatter(1, row, weights.sum(1, keepdim=True).to(scores.dtype))

    def priority(self, scores: Tensor, positions: Tensor, newest: Tensor, budget: int) -> Tensor:
        """Little attention goes first."""
        window = min(self.window, budget // 2)
        age = (
            newest - 1 - torch.arange(self.window, device=newest.device)
        ) % self.window  # 0: the latest query
        attention = scores.masked_fill((age >= window)[..., None], 0.0).sum(1)
        ranked = (positions >= 0) & (newest - positions > window)
        last = torch.iinfo(positions.dtype).max
        order = positions.masked_fill(~ranked, last).argsort(-1)
        in_order = attention.masked_fill(~ranked, 0.0).gather(-1, order)
        pooled = F.avg_pool1d(in_order[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]
        return torch.where(ranked, -torch.zeros_like(attention).scatter(-1, order, pooled), _SAFE)

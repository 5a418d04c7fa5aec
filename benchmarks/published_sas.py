"""The published SAS module, to be measured against: its layers, its order, its layouts.

Written from the description in the paper (Zheng et al., arXiv 2507.07694), sharing nothing with heedful but the
names of its checkpoints: convolutions over (B * T, H, D), every intermediate result stored, attention called with
values narrower than the queries, and each group of heads through the projection before the mean.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """`x + process(relu(x))`."""

    def __init__(self, process: nn.Module) -> None:
        super().__init__()
        self.process = process

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that `process` keeps."""
        return x + self.process(F.relu(x))


class PublishedSAS(nn.Module):
    """Causal SAS as published; `SASCore.load_published_state_dict` takes its state dict.

    Args:
        n_heads: H.
        sim_heads: Ĥ, a multiple of H.
        head_dim: D.
        sim_head_dim: D̂.
        kernel_size: W, odd.
    """

    def __init__(
        self, n_heads: int, sim_heads: int, head_dim: int, sim_head_dim: int, kernel_size: int = 3
    ) -> None:
        super().__init__()

        def expand_heads() -> list[nn.Module]:
            conv1 = nn.Conv1d(n_heads, sim_heads, kernel_size, padding=kernel_size // 2)
            conv2 = nn.Conv1d(sim_heads, sim_heads, kernel_size, padding=kernel_size // 2)
            return [conv1, Residual(conv2)]

        def expand_features() -> list[nn.Module]:
            return [nn.Linear(head_dim, sim_head_dim), Residual(nn.Linear(sim_head_dim, sim_head_dim))]

        self.n_heads, self.sim_heads = n_heads, sim_heads
        self.sas_q = nn.Sequential(*expand_heads(), *expand_features())
        self.sas_k = nn.Sequential(*expand_heads(), *expand_features())
        self.sas_v = nn.Sequential(*expand_heads())
        self.output_dense = nn.Linear(n_heads * head_dim, n_heads * head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend causally: q, k, v (B, T, H, D) -> (B, T, H * D)."""
        batch, length, heads, size = q.shape
        wide_q, wide_k, wide_v = (
            expand(x.reshape(batch * length, heads, size))
            .view(batch, length, self.sim_heads, -1)
            .transpose(1, 2)
            for expand, x in ((self.sas_q, q), (self.sas_k, k), (self.sas_v, v))
        )
        out = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=True)
        groups = self.sim_heads // self.n_heads
        merged = out.transpose(1, 2).reshape(batch, length, groups, heads * size)
        return self.output_dense(merged).mean(2)

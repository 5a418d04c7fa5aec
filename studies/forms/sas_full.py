"""SAS whose simulated heads have an output projection of their own each, instead of sharing that of their group."""

from dataclasses import dataclass

from torch import Tensor, nn

from heedful.attention import register_attention
from heedful.attention.sas import SASAttention, SASConfig


@dataclass(frozen=True)
class SASFullConfig(SASConfig):
    """SAS with a full output projection: (Ĥ - H)·D·C parameters more than with PEAA.

    The ablation of Zheng et al., arXiv 2507.07694 (PEAA against concatenation).
    """

    def shared_parameter_count(self) -> int:
        """With Ĥ heads in the output projection."""
        more = (self.score_heads - self.n_heads) * self.v_dim * self.d_model
        return super().shared_parameter_count() + more

    def shared_flops_per_token(self, context: int) -> int:
        """With Ĥ heads in the output projection."""
        more = 2 * (self.score_heads - self.n_heads) * self.v_dim * self.d_model
        return super().shared_flops_per_token(context) + more


@register_attention("sas_full", config=SASFullConfig)
class SASFullAttention(SASAttention):
    """SAS, all of whose Ĥ heads are concatenated and projected."""

    Config = SASFullConfig

    def reset_parameters(self) -> None:
        """Fresh weights, the output projection's at the size that PEAA's output has."""
        c = self.config
        self.o_proj = nn.Linear(c.score_heads * c.v_dim, c.d_model, bias=c.bias)
        super().reset_parameters()

    def aggregate(self, out: Tensor) -> Tensor:
        """(B, Ĥ, T, D) -> (B, T, C)."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

"""Selective attention with another voter, and without what the paper protects: for training and measuring alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.attention import register_score
from heedful.attention.config import ScoreConfig, option
from heedful.attention.score import Score


@register_score("votes")
class VotesScore(Score):
    """The votes of any head; those on a token itself and on the first token may count."""

    formula = """
        S[i,j] = relu(L^voter[i,j]), 0 where spared
        F[i,j] = sum_{u<i} S[u,j]
        out^h  = softmax_j(L^h - F) v^h
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        """Ablations of Leviathan et al., arXiv 2410.02703, section 3; by default it is selective attention."""

        voter: int = option(0, "the head that votes")
        spare_self: bool = option(True, "no token votes on itself")
        spare_first: bool = option(True, "nobody votes on the first token")

    config: Config

    def __init__(self, config: ScoreConfig, n_heads: int, d_model: int) -> None:
        super().__init__(config, n_heads, d_model)
        if not 0 <= self.config.voter < n_heads:
            raise ValueError(f"voter must be one of the heads 0 to {n_heads - 1}, got {self.config.voter}")

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend to whole rows, each segment for itself.

        Raises:
            NotImplementedError: with a cache or padding.
        """
        if state or k.shape[2] != q.shape[2] or key_mask is not None:
            raise NotImplementedError("score 'votes' takes whole rows: no cache, no padding")
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
        segments = torch.zeros_like(x[..., 0], dtype=torch.long) if segment_ids is None else segment_ids
        seen = (segments[:, :, None] == segments[:, None, :]).tril()
        votes = logits[:, self.config.voter].relu() * seen.tril(-1 if self.config.spare_self else 0)
        if self.config.spare_first:
            votes = votes * (seen.sum(-1)[:, None] > 1)  # the first token of a segment sees itself alone
        soft_mask = votes.cumsum(1) - votes
        weights = (logits - soft_mask[:, None]).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        return weights.to(v.dtype) @ v, {}

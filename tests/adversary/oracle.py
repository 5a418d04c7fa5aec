"""Selective attention as its formula says, one query, head and key at a time; autograd through it has gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """The arguments of one call; all of its numbers are float64."""

    tensors: dict[str, Tensor]
    """q (B,H,T,D), k (B,G,S,D), v (B,G,S,E); and maybe select_q, select_k, soft_mask."""
    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    scale: float | None = None

    def related(self, row: int, a: int, b: int) -> bool:
        """Both tokens are real and of one segment."""
        real = self.key_mask is None or bool(self.key_mask[row, a] and self.key_mask[row, b])
        return real and (
            self.segment_ids is None or bool(self.segment_ids[row, a] == self.segment_ids[row, b])
        )


def loop(call: Call, tau: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """S[i,j] = relu(L0[i,j]), F[i,j] = sum_{u<i} S[u,j], out = softmax(L - F) v.

    S is 0 on the first real token of the query's segment, and on the query itself. What a query still holds is
    M_i = sum_j 1 - min(F[i,j], tau) / tau.

    Returns:
        out (B, H, T, E), F after the last query (B, R, S), and M (B, R, T).
    """
    q, k, v = (call.tensors[name] for name in ("q", "k", "v"))
    select_q = call.tensors.get("select_q", q[:, :1])
    select_k = call.tensors.get("select_k", k[:, :1])
    (batch, heads, queries, size), (groups, keys), selectors = q.shape, k.shape[1:3], select_q.shape[1]
    scale = size**-0.5 if call.scale is None else call.scale
    select_scale = select_q.shape[-1] ** -0.5 if call.scale is None else call.scale
    earlier, nothing = keys - queries, q.new_zeros(())
    start = call.tensors.get("soft_mask", q.new_zeros(batch, selectors, earlier))
    out, counts, final = [], [], []
    for b in range(batch):
        masks = [[*start[b, r], *[nothing] * queries] for r in range(selectors)]
        for i in range(queries):
            here = earlier + i
            seen = [j for j in range(here + 1) if call.related(b, here, j)]
            for h in range(heads):
                g, r = h // (heads // groups), h * selectors // heads
                logits = [q[b, h, i] @ k[b, g, j] * scale - masks[r][j] for j in seen]
                weights = torch.stack(logits).softmax(0) if seen else []
                out.append(sum((w * v[b, g, j] for w, j in zip(weights, seen, strict=True)), v[b, g, 0] * 0))
            for r in range(selectors):
                counts.append(sum((1 - masks[r][j].clamp(max=tau) / tau for j in seen), nothing))
                for j in seen[1:]:
                    if j != here:
                        vote = (select_q[b, r, i] @ select_k[b, r, j] * select_scale).relu()
                        masks[r][j] = masks[r][j] + vote
        final += [torch.stack(row) for row in masks]
    return (
        torch.stack(out).view(batch, queries, heads, -1).transpose(1, 2),
        torch.stack(final).view(batch, selectors, keys),
        torch.stack(counts).view(batch, queries, selectors).transpose(1, 2),
    )

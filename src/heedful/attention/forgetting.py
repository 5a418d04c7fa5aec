"""Forgetting attention (FoX): every token says by how much all heads forget what came before it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heedful.attention.config import ScoreConfig, option
from heedful.attention.explicit import query_blocks
from heedful.attention.init import fill_
from heedful.attention.registry import register_score
from heedful.attention.score import EvictableScore, Select
from heedful.ops.decay import RunningSums, decay_after, decay_reference
from heedful.ops.decay_flex import attend_flex, flex_pays, flex_unavailable
from heedful.ops.dot_product import attention_sdpa, masked_softmax, repeat_kv, wide_logits
from heedful.ops.masks import visible_keys
from heedful.ops.precision import no_autocast, wide_dtype

BLOCK = 128
"""Queries that look at the same keys. More would look at keys to come, fewer cost calls."""
FEWEST = 32
"""Queries whose decay may be features; of fewer a bias is small."""


@register_score("forgetting")
class ForgettingScore(EvictableScore):
    """Softmax attention with a forget gate per head: a key loses log f of every token after it.

    The cache holds the decay of each key in each head; it begins at 0 and grows with every token, so that it is
    exact at any length and whoever is evicted. In every head the key with the most decay is the oldest: to evict
    by decay is to evict by age, and the policy for that is `streaming`.
    """

    formula = """
        f^h_t    = sigmoid(w^h . x_t + b^h)
        D^h[i,j] = - sum_{j<l<=i} log f^h_l,  within the segment, over real tokens
        out^h[i] = sum_{j<=i} softmax_j(q^h_i . k^h_j / sqrt(D) - D^h[i,j]) v^h_j
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        """Forgetting attention: of every token each head learns how much to forget. H·(C+1) parameters.

        Lin et al., arXiv 2503.02130, ICLR 2025 (FoX). The cache holds one more fp32 number per token and head.
        The authors' models have no rotary positions by default: rope=False.
        """

        implementations = ("auto", "reference", "sdpa", "flex")

        impl: str = option(
            "auto", "how it is computed: auto, reference (readable, slow), sdpa, or flex (FlexAttention)"
        )
        gate_bias: float = option(
            0.0, "start of the gates' bias; the authors': 0, half is forgotten per token; 5: 1 in 150"
        )

        def parameter_count(self, n_heads: int, d_model: int) -> int:
            """H·(C+1)."""
            return n_heads * (d_model + 1)

        def flops_per_token(self, context: int, n_heads: int, qk_dim: int, v_dim: int, d_model: int) -> int:
            """Those of softmax, and the gates'."""
            return super().flops_per_token(context, n_heads, qk_dim, v_dim, d_model) + 2 * n_heads * d_model

        def state_bytes_per_token(self, n_heads: int, bytes_per_value: int = 4) -> int:
            """One float32 per token and head."""
            return 4 * n_heads

    config: Config
    state_names = ["decay"]
    per_head = ["decay"]
    bilinear = True
    spares_first = False

    def __init__(self, config: ScoreConfig, n_heads: int, d_model: int) -> None:
        super().__init__(config, n_heads, d_model)
        self.gate_proj = nn.Linear(d_model, n_heads)

    def reset_parameters(self) -> None:
        """The gates start around sigmoid(`gate_bias`)."""
        fill_(self.gate_proj.bias, torch.full((self.n_heads,), float(self.config.gate_bias)))

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
        """`softmax(L - D) v`, with the decay of each key in `state["decay"]`, (B, H, S - T)."""
        length, n_keys = q.shape[2], k.shape[2]
        visible = visible_keys(length, n_keys, key_mask, segment_ids, q.device)
        counts = visible.tril(n_keys - length - 1)
        steps, earlier = self._steps(x, visible), state.get("decay")
        if self.config.impl == "reference" or length <= 1:
            decay = decay_reference(steps, earlier, counts)
            after = _last(decay) if length else decay_after(steps, earlier, counts)
            return self._attend(q, k, v, decay, visible, scale), {"decay": after}
        before = n_keys - length
        sums = RunningSums.of(F.pad(steps, (before, 0)), segment_ids)
        if self._takes_flex(q, k, v, sums.sums):
            out = attend_flex(q, k, v, sums, earlier, visible, scale)
        else:
            out = self._in_blocks(q, k, v, sums, earlier, visible, scale)
        with no_autocast(q.device):
            after = decay_after(steps, earlier, counts)
        return out, {"decay": after}

    def _takes_flex(self, q: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> bool:
        if self.config.impl != "flex":
            return self.config.impl == "auto" and flex_pays(q, k, v, sums)
        reason = flex_unavailable(q, k, v, sums)
        if reason:
            raise ValueError(f"impl='flex' cannot run here: {reason}")
        return q.numel() > 0  # of an empty batch it makes no blocks

    def _in_blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sums: RunningSums,
        earlier: Tensor | None,
        visible: Tensor,
        scale: float,
    ) -> Tensor:
        """Never a bias of all pairs in memory."""
        length, outputs = q.shape[2], []
        before = k.shape[2] - length
        for start, end in query_blocks(length, BLOCK):
            last = before + end
            block, scaled, decay = (q[:, :, start:end], k[:, :, :last], v[:, :, :last]), scale, None
            if decay_fuses(q.device, end - start):
                features = sums.features(earlier, before + start, last)
                block, scaled = (*_with_features(*block[:2], *features, scale), block[2]), 1.0
            else:
                decay = sums.decay(earlier, before + start, last)
            outputs.append(self._weigh(*block, decay, visible[:, start:end, :last], scaled))
        return torch.cat(outputs, dim=2)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        visible: Tensor,
        voted: Tensor,
        scale: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`softmax(L - D) v` over the visible keys; a gate counts for whoever may be voted on."""
        decay = decay_reference(self._steps(x, visible), state.get("decay"), voted)
        return self._attend(q, k, v, decay, visible, scale), {"decay": _last(decay)}

    def logits(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        voted: Tensor,
        scale: float,
        select: Select = None,
    ) -> Tensor:
        """L - D, (B, H, T, S)."""
        # A padded query votes on nobody, and its own weights are not looked at.
        return wide_logits(q, k, scale) - decay_reference(self._steps(x), state.get("decay"), voted)

    def _steps(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """-log f, (B, H, T), float32 or wider; 0 for queries that see nothing, as padded ones."""
        gates = self.gate_proj(x).to(wide_dtype(x)).transpose(1, 2)
        steps = -F.logsigmoid(gates)
        return steps if visible is None else steps.masked_fill(~visible.any(-1)[:, None], 0.0)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, visible: Tensor, scale: float
    ) -> Tensor:
        """The outputs."""
        if self.config.impl != "reference" and q.shape[2]:  # of no query PyTorch's give the gates no gradient
            return self._weigh(q, k, v, decay, visible, scale)
        with no_autocast(q.device):
            weights = masked_softmax(wide_logits(q, k, scale) - decay, visible[:, None])
            return (weights @ repeat_kv(v.to(wide_dtype(q)), q.shape[1])).to(v.dtype)

    def _weigh(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, visible: Tensor, scale: float
    ) -> Tensor:
        """The outputs, by PyTorch's kernels; without a decay, q and k hold it."""
        dtype, seen = wide_dtype(q), visible[:, None]
        with no_autocast(q.device):
            # A row without any key would be NaN, in its gradient too: let it see everything, then drop it.
            alive = seen.any(-1, keepdim=True)
            mask = seen | ~alive if decay is None else (-decay).masked_fill(~seen & alive, -torch.inf)
            # In 16 bits the bias would be off by whole units where the decay is large.
            out = attention_sdpa(q.to(dtype), k.to(dtype), v.to(dtype), scale, mask=mask)
            return out.masked_fill(~alive, 0.0).to(v.dtype)


def _last(decay: Tensor) -> Tensor:
    """The decay after the last query, a copy: a view in a cache would keep all rows alive."""
    return decay[:, :, -1].clone()


def _with_features(
    q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product holds the logits, scaled, and that of the features before them."""
    dtype = wide_dtype(q)
    q = torch.cat([queries, q.to(dtype) * scale], dim=-1)
    return q, torch.cat([keys, repeat_kv(k, q.shape[1]).to(dtype)], dim=-1)


def decay_fuses(device: torch.device, n_queries: int) -> bool:
    """Whether the decay may be features of queries and keys, which needs no bias with a gradient.

    Few queries take another product on a CPU, which adds up in another order; a GPU may round features first.
    """
    return device.type == "cpu" and n_queries >= FEWEST

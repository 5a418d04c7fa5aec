"""The base class of attention forms. Read this first, then `score.py`: a Score uses the q, k, v made here."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heedful.attention.cache import KVCache, LayerCache
from heedful.attention.config import AttentionConfig
from heedful.attention.plain import is_plain
from heedful.attention.registry import SCORES
from heedful.attention.score import LayerLoss, Score
from heedful.attention.signature import ConfigSignature, check_keywords
from heedful.attention.tokens import Tokens
from heedful.ops.checks import check_shape, check_tensor, show
from heedful.ops.masks import rank_in_segment
from heedful.ops.precision import wide_dtype
from heedful.ops.rope import in_order, rope


class Attention(nn.Module):
    """How q, k, v and the output are made; a form writes `project`.

    `(B, T, C) -> (B, T, C)`, causal. The base class holds what all forms share: the score, QK-norm,
    rotary positions, the cache, the output projection `o_proj`.

    Args:
        *args: a config, or the fields of one.
        **kwargs: the fields of the config by name; an unknown one raises.

    Raises:
        TypeError: for an argument that is no field of the config, saying what it could have been.
        ValueError: for a value that does not fit.
    """

    Config: ClassVar[type[AttentionConfig]] = AttentionConfig
    __signature__ = ConfigSignature()
    formula: ClassVar[str] = ""
    """What it computes, for `heedful show`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        config = self._config(*args, **kwargs)
        self.config = config
        self.score: Score = SCORES[str(config.score_config.form)].module_class(
            config.score_config, config.score_heads, config.d_model
        )
        if self.score.selectors not in (1, config.score_kv_heads):
            apart = config.score_kv_heads
            allowed = "1, as all heads share what is cached"
            if apart > 1:
                allowed = f"1 or the number of key heads ({apart})"
            raise ValueError(f"selectors must be {allowed}, got {self.score.selectors}")
        self.o_proj = nn.Linear(config.n_heads * config.v_dim, config.d_model, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.qk_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.qk_dim, eps=config.norm_eps)

    # What a form writes.

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Make the queries, and what is remembered of each token.

        Args:
            x: (B, T, C).
            positions: (1 or B, T), the position of each token in its own sequence.

        Returns:
            q (B, H, T, D) and named tensors of T tokens, `(B, G, T, ·)` or `(B, T)`; with the default
            `keys_values` these are "k" and "v".
        """
        raise NotImplementedError

    def keys_values(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys (B, G, S, D) and values (B, G, S, E) of all tokens, from what `project` remembered."""
        return memory["k"], memory["v"]

    def aggregate(self, out: Tensor) -> Tensor:
        """(B, H, T, E) -> (B, T, C): merge the heads and project."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    # What all forms share.

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        key_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
        losses: list[LayerLoss] | None = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            x: (B, T, C).
            positions: (1 or B, T) position of each token; default: counted per row and segment over
                the real tokens, going on from the cache.
            key_mask: (B, T) bool, False = padding. The cache remembers it.
            segment_ids: (B, T) integers for packed sequences. The cache remembers them.
            cache: what earlier tokens left; the new tokens are added to it.
            losses: receives the layer's own loss where its score trains one; not together with a cache.

        Returns:
            (B, T, C).

        Raises:
            ValueError: if a shape does not fit.
        """
        check_tensor("x", x, "(B, T, C)")
        batch, length, _ = x.shape
        check_shape("x", x, (batch, length, self.config.d_model), "(B, T, C)")
        self._check_mask("key_mask", key_mask, (batch, length))
        self._check_mask("segment_ids", segment_ids, (batch, length))
        if positions is None:
            given = key_mask, segment_ids
            if cache is None:
                positions = rank_in_segment(length, *given, x.device)
            else:
                positions = cache.next_positions(*given, batch, length, x.device)
        if key_mask is not None:
            # whatever padding holds, NaN too: 0 times it would be NaN
            x = x.masked_fill(~key_mask[..., None], 0.0)
        q, memory = self.project(x, positions)
        tokens = Tokens.of(self, x, q, memory, key_mask, segment_ids)
        return self.aggregate(self.attend(tokens, cache, losses))

    def attend(self, tokens: Tokens, cache: KVCache | None, losses: list[LayerLoss] | None) -> Tensor:
        """Let new tokens attend, alone or after those in the cache: the outputs of the heads, (B, H, T, E)."""
        return tokens.attend_alone(self, losses) if cache is None else cache.attend(self, tokens)

    @property
    def scale(self) -> float:
        """Multiplies the logits: 1/sqrt(D)."""
        return self.config.qk_dim**-0.5

    def place_queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """QK-norm and rotary positions, as configured, on (B, H, T, D)."""
        return self._place(q, positions, self.q_norm if self.config.qk_norm else None)

    def place_keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """QK-norm and rotary positions, as configured, on (B, G, S, D)."""
        return self._place(k, positions, self.k_norm if self.config.qk_norm else None)

    def logit_sizes(self, q: Tensor, k: Tensor, real_q: Tensor, real_k: Tensor) -> Tensor:
        """The largest sizes of queries and keys; no logit, of any head, exceeds their product.

        With QK-norm they are at least what the gains allow, so that they hold for all others as well; a norm that
        is not PyTorch's own, or has hooks, promises nothing, and what comes out of it is measured alone.

        Args:
            q: (B, H, T, D).
            k: (B, G, S, D).
            real_q: (B, T) bool, False = padding, which does not count.
            real_k: (B, S) bool.

        Returns:
            (B, 2), float32 or wider.
        """
        dtype, root = wide_dtype(q), self.config.qk_dim**0.25
        sizes = [
            x.to(dtype).norm(dim=-1).masked_fill(~real[:, None], 0.0).flatten(1).amax(-1) / root
            for x, real in ((q, real_q), (k, real_k))
        ]
        if self.config.qk_norm:
            for i, norm in enumerate((self.q_norm, self.k_norm)):
                if is_plain(norm):
                    sizes[i] = torch.maximum(sizes[i], norm.weight.abs().max().to(dtype) * root)
        return torch.stack(sizes, dim=-1)

    def split_heads(self, x: Tensor, n_heads: int) -> Tensor:
        """(B, T, H * D) -> (B, H, T, D)."""
        return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)

    def reset_parameters(self) -> None:
        """Fresh weights: logits start with standard deviation `init_logit_std`.

        With QK-norm the gains see to it; without, the q and k projections do.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.qk_norm:
            for norm in (self.q_norm, self.k_norm):
                nn.init.constant_(norm.weight, self.config.init_logit_std**0.5)
        else:
            projections = self.logit_projections()
            gain = self.config.init_logit_std ** (1 / len(projections))
            for projection in projections:
                nn.init.normal_(projection.weight, std=gain * projection.in_features**-0.5)
        self.score.reset_parameters()

    def logit_projections(self) -> list[nn.Linear]:
        """The projections that make the logits and nothing else; asked where there is no QK-norm.

        They share `init_logit_std` evenly: two of them, as q and k, get its square root each. A form whose keys are
        its values, too, names the queries' alone.

        Raises:
            NotImplementedError: if the form does not say.
        """
        raise NotImplementedError(
            f"without QK-norm {type(self).__name__} must say which projections start smaller, so that its logits "
            f"start at init_logit_std: write logit_projections(), e.g. return [self.q_proj, self.k_proj]"
        )

    @torch.no_grad()
    def measured_cache_bytes(self) -> int:
        """Bytes that one token takes in a `LayerCache`, for configs without a formula."""
        cache, weight = LayerCache(), next(self.parameters())
        self(weight.new_zeros(1, 1, self.config.d_model), cache=cache)
        return cache.used_bytes

    def identity_parameters(self) -> list[Tensor]:
        """Parameters that hold an identity map, which weight decay must not pull to zero."""
        return []

    def _config(self, *args: Any, **kwargs: Any) -> AttentionConfig:
        if not args or not isinstance(args[0], AttentionConfig):
            self._check_keywords(kwargs)
            return self.Config(*args, **kwargs)
        if len(args) > 1 or kwargs:
            more = [*map(repr, args[1:]), *kwargs]
            raise TypeError(
                f"{type(self).__name__} takes a config or the fields of one, got a config and "
                f"{', '.join(more)}; use dataclasses.replace(config, ...)"
            )
        if not isinstance(args[0], self.Config):
            raise TypeError(
                f"{type(self).__name__} needs a {self.Config.__name__}, got a "
                f"{type(args[0]).__name__}; config.build() makes the module that fits"
            )
        return args[0]

    def _check_keywords(self, given: dict[str, Any]) -> None:
        score, advice = given.get("score"), ""
        if isinstance(score, str) and any(name in SCORES[score].options for name in given):
            advice = f"options of score={score!r} go into its config, or all into heedful.build(); "
        check_keywords(type(self).__name__, given, self.Config, advice)

    def _place(self, x: Tensor, positions: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        config = self.config
        x = as_wide_as_gains(x, norm)
        turn = partial(rope, positions=positions, theta=config.rope_theta, base_dim=config.size)
        return in_order(x, norm, turn if config.rope else None, config.qk_norm_position == "before_rope")

    def _check_mask(self, name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
        if mask is None:
            return
        check_tensor(name, mask, "(B, T)")
        if name == "key_mask" and mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool (True = real token), got {show(mask)}")
        if name == "segment_ids" and (mask.is_floating_point() or mask.dtype == torch.bool):
            raise TypeError(f"segment_ids must be integers, got {show(mask)}")
        check_shape(name, mask, shape, "(B, T)")


def as_wide_as_gains(x: Tensor, norm: nn.Module | None) -> Tensor:
    """`x` in the precision of the norm it is for: under autocast x is bf16 and the gain is not."""
    gains = getattr(norm, "weight", None)
    return x.to(gains.dtype) if isinstance(gains, Tensor) else x

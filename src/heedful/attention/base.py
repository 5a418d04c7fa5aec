"""The base classes of all forms. Read this first: an Attention makes q, k, v; a Score uses them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heedful.attention.cache import LayerCache, token_axis
from heedful.attention.config import AttentionConfig, ScoreConfig
from heedful.attention.eviction.attend import attend_evicting, check_one_selector
from heedful.attention.eviction.cache import EvictingCache
from heedful.attention.plain import is_plain
from heedful.attention.registry import SCORES
from heedful.ops.checks import check_shape, check_tensor, show
from heedful.ops.masks import visible_keys
from heedful.ops.precision import wide_dtype
from heedful.ops.rope import rope


@dataclass(frozen=True)
class LayerLoss:
    """What a layer adds to the training loss."""

    loss: Tensor
    """(B,), per row, weighted."""
    kept: Tensor
    """(B, T), the tokens that each query still holds, softly counted; 0 at padding. Detached."""


class Score(nn.Module):
    """What happens to the logits; write `forward`.

    Args:
        config: the form's own options.
        n_heads: the number of heads that attend.
        d_model: C, the width of `x`, for scores that compute something from it.
    """

    Config: ClassVar[type[ScoreConfig]] = ScoreConfig
    formula: ClassVar[str] = ""
    """What it computes, for `heedful show`."""

    @property
    def causal_to_the_bit(self) -> bool:
        """Whether a later token leaves every bit of an earlier output; else it may change how it is rounded."""
        return True

    def __init__(self, config: ScoreConfig, n_heads: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.n_heads = n_heads
        self.d_model = d_model

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
        """Attend.

        Args:
            q: (B, H, T, D).
            k: (B, G, S, D), S >= T; the last T keys belong to the queries.
            v: (B, G, S, E).
            x: (B, T, C), what the layer was given.
            state: what an earlier call returned, for the S - T earlier keys; empty at the start.
            key_mask: (B, S) bool, False = padding, or None.
            segment_ids: (B, S) integers, or None.
            scale: multiplies the logits.

        Returns:
            out (B, H, T, E), zeros at padded queries, and the state to hand to the next call.
        """
        raise NotImplementedError

    def layer_loss(
        self,
        q: Tensor,
        k: Tensor,
        *,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        scale: float,
    ) -> LayerLoss | None:
        """A loss of this layer's own, for scores that train one; None where there is none.

        Args:
            q: (B, H, T, D).
            k: (B, G, T, D).
            key_mask: (B, T) bool, False = padding, or None.
            segment_ids: (B, T) integers, or None.
            scale: multiplies the logits.
        """
        return None

    # What a cache that evicts needs; a score that leaves these out works with every other cache.

    state_names: ClassVar[list[str]] = []
    """Names of the per-token tensors (B, R, S) in `state`."""

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
        """`forward` over keys in any order, with ready masks.

        Args:
            q: (B, H, T, D).
            k: (B, G, S, D).
            v: (B, G, S, E).
            x: (B, T, C).
            state: per-token state of the first keys; keys beyond it start at 0.
            visible: (B, T, S) bool, the keys each query attends to.
            voted: (B, T, S) bool, the keys each query may vote on.
            scale: multiplies the logits.

        Returns:
            out (B, H, T, E) and the state for all S keys.
        """
        raise NotImplementedError(f"score {self.config.form!r} does not support caches that evict")

    def attend_slots(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        positions: Tensor,
        newest: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` for one token per row that sees every key; the state is updated in place.

        Args:
            q: (B, H, 1, D).
            k: (B, G, C, D), in any order but for the first real token, which comes first.
            v: (B, G, C, E).
            x: (B, 1, C).
            state: per-token state of all keys, the query's own included.
            positions: (B, C) position of each key in its row.
            newest: (B, 1), where the query's own key is.
            scale: multiplies the logits.

        Returns:
            out (B, H, 1, E), and the slot with the most votes against it, (B, 1), the oldest among equals, never
            slot 0; None where nobody votes or it was not looked for.
        """
        visible = torch.ones_like(positions, dtype=torch.bool)
        voted = (positions > 0).scatter(-1, newest, False)
        out, after = self.attend(
            q, k, v, x=x, state=state, visible=visible[:, None], voted=voted[:, None], scale=scale
        )
        check_one_selector(after)
        for name, value in after.items():
            state[name].copy_(value)
        return out, None

    def attend_pruned(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        positions: Tensor,
        scale: float,
        evict: Callable[[Tensor | None], Tensor | None],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`attend` where keys are evicted as the votes go.

        Args:
            q: (B, H, T, D).
            k: (B, G, S, D); the last T keys belong to the queries.
            v: (B, G, S, E).
            x: (B, T, C).
            state: per-token state of the first S - T keys; the others start at 0.
            positions: (B, S) position of each key in its row, -1 = padding or nothing.
            scale: multiplies the logits.
            evict: from F before every query, (B, T, S), or None for a score without votes, to the index of the
                first query that no longer sees each key, (B, S) integers; None = all stay.

        Returns:
            out (B, H, T, E) and the state for all S keys.
        """
        length, n_keys = q.shape[2], k.shape[2]
        real = (positions >= 0)[:, None] & (positions[:, n_keys - length :, None] >= 0)
        visible = visible_keys(length, n_keys, None, None, q.device) & real
        voted = visible.tril(n_keys - length - 1) & (positions > 0)[:, None]
        rows = None
        if "soft_mask" in self.state_names:
            rows = self.soft_mask_rows(q, k, state, voted, scale)
        gone_at = evict(rows)
        if gone_at is not None:
            visible = visible & (torch.arange(length, device=q.device)[:, None] < gone_at[:, None])
        return self.attend(q, k, v, x=x, state=state, visible=visible, voted=voted, scale=scale)

    def soft_mask_rows(
        self, q: Tensor, k: Tensor, state: dict[str, Tensor], voted: Tensor, scale: float
    ) -> Tensor:
        """F before every query, (B, T, S), for the selective eviction policy."""
        raise NotImplementedError(f"score {self.config.form!r} has no soft mask")

    def weights(
        self, q: Tensor, k: Tensor, state: dict[str, Tensor], visible: Tensor, scale: float
    ) -> Tensor:
        """The attention weights (B, H, T, S) of `attend`, for policies that evict by them."""
        raise NotImplementedError(f"score {self.config.form!r} does not show its attention weights")


class Attention(nn.Module):
    """How q, k, v and the output are made; a form writes `project`.

    `(B, T, C) -> (B, T, C)`, causal. The base class holds what all forms share: the score, QK-norm,
    rotary positions, the cache, the output projection `o_proj`.

    Args:
        *args: a config, or the fields of one.
        **kwargs: the fields of the config by name; an unknown one raises.
    """

    Config: ClassVar[type[AttentionConfig]] = AttentionConfig
    formula: ClassVar[str] = ""
    """What it computes, for `heedful show`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        config = self._config(*args, **kwargs)
        self.config = config
        self.score: Score = SCORES[str(config.score_config.form)].module_class(
            config.score_config, config.score_heads, config.d_model
        )
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
        cache: LayerCache | None = None,
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
            known = cache if cache is not None else LayerCache()
            positions = known.next_positions(key_mask, segment_ids, batch, length, x.device)
        q, memory = self.project(x, positions)
        if cache is None:
            return self.aggregate(self._attend(x, q, memory, key_mask, segment_ids, None, losses))
        if not cache.recording:
            cache.drop_record()  # tokens that are not recorded hide those before them
            return self.aggregate(self._attend(x, q, memory, key_mask, segment_ids, cache))
        undo, grad = cache.snapshot(), torch.is_grad_enabled()
        out = self._attend(x, q, memory, key_mask, segment_ids, cache)

        def replay(n: int) -> None:
            with torch.set_grad_enabled(grad):
                self._replay(n, x, q, memory, key_mask, segment_ids, cache)

        cache.record(length, undo, replay)
        return self.aggregate(out)

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        memory: dict[str, Tensor],
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        cache: LayerCache | None,
        losses: list[LayerLoss] | None = None,
    ) -> Tensor:
        """Remember T new tokens and let them attend: the outputs of the heads, (B, H, T, E)."""
        if isinstance(cache, EvictingCache):
            if segment_ids is not None:
                raise ValueError("packed segments and a cache that evicts do not go together")
            return attend_evicting(self, x, q, memory, key_mask, cache)
        state: dict[str, Tensor] = {}
        if cache is not None:
            state = cache.state
            key_mask = cache.whole_mask("key_mask", key_mask, x.shape[:2])
            segment_ids = cache.whole_mask("segment_ids", segment_ids, x.shape[:2])
            memory = cache.append(**memory)
            cache.remember_mask("key_mask", key_mask)
            cache.remember_mask("segment_ids", segment_ids)
        k, v = self.keys_values(memory)
        scale = self.config.qk_dim**-0.5
        if losses is not None and cache is None:
            own = self.score.layer_loss(q, k, key_mask=key_mask, segment_ids=segment_ids, scale=scale)
            if own is not None:
                losses.append(own)
        out, state = self.score(
            q,
            k,
            v,
            x=x,
            state=state,
            key_mask=key_mask,
            segment_ids=segment_ids,
            scale=scale,
        )
        if cache is not None:
            cache.state = state
        return out

    def _replay(
        self,
        n: int,
        x: Tensor,
        q: Tensor,
        memory: dict[str, Tensor],
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        cache: LayerCache,
    ) -> None:
        """Remember the first n tokens of a piece again."""
        first = {name: tensor.narrow(token_axis(tensor), 0, n) for name, tensor in memory.items()}
        masks = [None if mask is None else mask[:, :n] for mask in (key_mask, segment_ids)]
        self._attend(x[:, :n], q[:, :, :n], first, masks[0], masks[1], cache)

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
            for name in ("q_proj", "k_proj"):
                if isinstance(projection := getattr(self, name, None), nn.Linear):
                    gain = self.config.init_logit_std**0.5
                    nn.init.normal_(projection.weight, std=gain * projection.in_features**-0.5)

    def identity_parameters(self) -> list[Tensor]:
        """Parameters that hold an identity map, which weight decay must not pull to zero."""
        return []

    def _config(self, *args: Any, **kwargs: Any) -> AttentionConfig:
        if not args or not isinstance(args[0], AttentionConfig):
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

    def _place(self, x: Tensor, positions: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        config = self.config
        gains = getattr(norm, "weight", None)
        if isinstance(gains, Tensor):
            x = x.to(gains.dtype)  # under autocast x is bf16 and the gain is not
        if norm is not None and config.qk_norm_position == "before_rope":
            x = norm(x)
        if config.rope:
            x = rope(x, positions, theta=config.rope_theta, base_dim=config.size)
        if norm is not None and config.qk_norm_position == "after_rope":
            x = norm(x)
        return x

    def _check_mask(self, name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
        if mask is None:
            return
        check_tensor(name, mask, "(B, T)")
        if name == "key_mask" and mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool (True = real token), got {show(mask)}")
        if name == "segment_ids" and (mask.is_floating_point() or mask.dtype == torch.bool):
            raise TypeError(f"segment_ids must be integers, got {show(mask)}")
        check_shape(name, mask, shape, "(B, T)")

"""Generating and evaluating with a bound on what the cache holds, for every causal model of ours."""

from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin

from heedful.attention.eviction import Eviction
from heedful.attention.eviction.settings import AnyBudget
from heedful.hf.cache import HeedfulCache, check_cache
from heedful.hf.names import CACHE, one_cache

KV_NAMES = "kv_budget", "kv_policy", "kv_evict_every", "kv_threshold", "kv_grace", "kv_first"


class BudgetedGenerationMixin(GenerationMixin):
    """`generate` and `evaluate_nll` under an `Eviction`; a model says which cache it needs (`new_cache`)."""

    config: Any

    def new_cache(self, eviction: Eviction) -> HeedfulCache:
        """An empty cache for this model that evicts as told."""
        raise NotImplementedError

    @property
    def scores(self) -> list[Any]:
        """The score of every layer that a cache may evict from."""
        raise NotImplementedError

    def saved_eviction(self) -> Eviction:
        """What the model's config asks for."""
        return Eviction.of(self.config.eviction)

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        kv_budget: AnyBudget = None,
        kv_policy: str | None = None,
        kv_evict_every: int | None = None,
        kv_threshold: float | None = None,
        kv_grace: int | None = None,
        kv_first: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate` with a bound on the tokens that the cache holds.

        Args:
            *args: as in transformers.
            kv_budget: tokens held per layer while attending, those that never go included: a number >= 2,
                a list with one per layer, "full", or an `Eviction`. What is left out here is taken from the
                `generation_config` given, then from `model.generation_config`, then from `config.eviction`; without
                any, everything is kept.
            kv_policy: which token is evicted: "selective", the default, needs a selective model; "streaming",
                "h2o", "tova", "snapkv", "keydiff" and "random" go with any.
            kv_evict_every: evict only at token positions divisible by it; up to kv_evict_every - 1 more tokens
                are held.
            kv_threshold: votes F above which a token goes at once, > 0; needs the policy "selective". The cache
                returned with the output then bounds the attention mass that was lost, `cache.forgotten`.
            kv_grace: the newest tokens that never go, the one that has just arrived included.
            kv_first: the first tokens that never go.
            **kwargs: as in transformers; `prefill_chunk_size` bounds what is held while the prompt is read to
                the budget and one chunk, and assisted decoding holds the budget and one draft after its first
                forward pass.

        Raises:
            ValueError: for an unsound budget or threshold, an unknown policy, or a budget or threshold together
                with a cache of one's own or `use_cache=False`.
        """
        if kwargs.get("segment_ids") is not None:
            raise ValueError("generate() continues one text per row: leave out segment_ids")
        if (cache := one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))) is not None:
            kwargs[CACHE] = cache
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        use_cache = kwargs.get("use_cache", getattr(given, "use_cache", None))
        values = kv_budget, kv_policy, kv_evict_every, kv_threshold, kv_grace, kv_first
        asked: dict[str, Any] = {
            name: getattr(given, name, None) if value is None else value
            for name, value in zip(KV_NAMES, values, strict=True)
        }
        if cache is None and use_cache is not False:
            eviction = self.resolve_eviction(**asked)
            if eviction.evicts:
                eviction.check_scores(self.scores)  # at once: a streamer would be sent the prompt first
                kwargs[CACHE] = self.new_cache(eviction)
        elif Eviction.of(**asked).evicts:
            raise ValueError(
                "kv_budget, kv_threshold and kv_evict_every make a cache: leave out past_key_values and "
                "use_cache=False"
            )
        return super().generate(*args, **kwargs)

    @torch.no_grad()
    def evaluate_nll(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        kv_budget: AnyBudget = None,
        kv_policy: str | None = None,
        reduction: Literal["mean", "none"] = "mean",
        kv_evict_every: int | None = None,
        kv_threshold: float | None = None,
        kv_grace: int | None = None,
        kv_first: int | None = None,
    ) -> Tensor:
        """Negative log-likelihood of a text as a cache with a budget would see it, in one forward pass.

        The evictions are replayed exactly: the result is that of decoding token by token with `kv_budget`.

        Args:
            ids: (B, T) token ids.
            attention_mask: (B, T), 0 = padding, which is not counted.
            kv_budget: as in `generate`, as all that begins with `kv_`.
            kv_policy: as in `generate`.
            reduction: "mean" over the real predicted tokens, or "none".
            kv_evict_every: as in `generate`.
            kv_threshold: as in `generate`.
            kv_grace: as in `generate`.
            kv_first: as in `generate`.

        Returns:
            A scalar, or (B, T-1), nats; 0 where the token is padding.

        Raises:
            ValueError: for an unsound budget, policy or reduction.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        eviction = self.resolve_eviction(
            kv_budget, kv_policy, kv_evict_every, kv_threshold, kv_grace, kv_first
        )
        forward: Any = self
        more: dict[str, Any] = {CACHE: self.new_cache(eviction)}
        if attention_mask is not None:
            more["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        output = forward(ids, attention_mask=attention_mask, **more)
        logits = output.logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        if attention_mask is not None:
            counted = (attention_mask[:, 1:] * attention_mask[:, :-1]).bool()
            nll = nll.masked_fill(~counted, 0.0)
            return nll.sum() / counted.sum() if reduction == "mean" else nll
        return nll.mean() if reduction == "mean" else nll

    def resolve_eviction(
        self,
        kv_budget: AnyBudget = None,
        kv_policy: str | None = None,
        kv_evict_every: int | None = None,
        kv_threshold: float | None = None,
        kv_grace: int | None = None,
        kv_first: int | None = None,
    ) -> Eviction:
        """What `generate` does if asked for this: the rest is from the generation config, then from the config.

        Raises:
            ValueError: for what is unsound.
        """
        given = kv_budget, kv_policy, kv_evict_every, kv_threshold, kv_grace, kv_first
        usual = self.generation_config
        asked: dict[str, Any] = {
            name: getattr(usual, name, None) if value is None else value
            for name, value in zip(KV_NAMES, given, strict=True)
        }
        saved = self.saved_eviction()
        if asked["kv_budget"] is None:
            eviction = Eviction.of(**{**asked, "kv_budget": saved})
            if asked["kv_policy"] is not None and not eviction.evicts:
                raise ValueError(
                    f"kv_policy={asked['kv_policy']!r} needs a budget or a threshold; nothing is evicted without"
                )
            return eviction
        if isinstance(asked["kv_budget"], int | list | tuple):
            # the number alone was given: who goes is as saved
            for name in ("policy", "grace", "first"):
                if asked[f"kv_{name}"] is None:
                    asked[f"kv_{name}"] = getattr(saved, name)
        return Eviction.of(**asked)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Continuous batching needs paged attention: without this it would fail in a thread, unheard."""
        raise NotImplementedError(
            "continuous batching and paged caches are not supported; use generate() with its own cache"
        )

    def keep_kv_settings(self) -> None:
        """Before saving: see to it that a `kv_budget` of the generation config is kept, too."""
        kept = self.generation_config
        if any(getattr(kept, name, None) is not None for name in KV_NAMES):
            # Else transformers takes it for a copy of the config, and makes it anew when the model is loaded.
            kept._from_model_config = False

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # True would let generate() build a cache that knows keys and values only.
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={implementation!r} is not supported: heedful has its own cache; "
                f"leave it out"
            )
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            check_cache(cache, len(self.new_cache(Eviction()).layers))
        elif generation_config.use_cache:
            cache = model_kwargs[CACHE] = self.new_cache(Eviction())
        layers: list[Any] = [] if cache is None else cache.layers
        for layer in layers:
            # Assisted decoding turns it on; a cache that comes from there must not go on recording.
            layer.record_past = bool(generation_config.is_assistant)

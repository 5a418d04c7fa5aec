"""`HeedfulForCausalLM`: the decoder as a Hugging Face causal language model."""

from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from heedful.attention.eviction import get_policy
from heedful.attention.score import LayerLoss
from heedful.decoder import DecoderParts
from heedful.hf.cache import HeedfulCache, check_cache
from heedful.hf.configuration import HeedfulConfig

# What Trainer and generate pass along and this model may ignore or hands to the loss.
_PASSED_ALONG = {"num_items_in_batch", "return_dict", "cache_position", "output_attentions"}


@dataclass
class HeedfulOutput(CausalLMOutputWithPast):
    """What `HeedfulForCausalLM.forward` returns."""

    memory_loss: Tensor | None = None
    """The part of `loss` that is the memory loss, in training; detached."""
    kept_tokens: tuple[Tensor, ...] | None = None
    """(B, T) per layer that trains a memory loss: the tokens each query still holds, softly counted."""


class HeedfulForCausalLM(PreTrainedModel, DecoderParts, GenerationMixin):
    """A causal language model with any registered attention and score.

    The parameter names are those of `heedful.Decoder`. Trains with `Trainer`, samples with `generate`,
    saves as config.json and safetensors.
    """

    config_class = HeedfulConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: HeedfulConfig) -> None:
        super().__init__(config)
        self.add_parts(config.to_decoder_config())
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        self.reset_module(module)

    def _initialize_weights(self, module: torch.nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers this skips every module without parameters of its own, Block among
        # them. Ours resets through torch.nn.init, where loaded parameters are marked and left alone.
        super()._initialize_weights(module, False)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> torch.nn.Linear:
        """The projection to logits."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear) -> None:
        """Replace the projection to logits."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HeedfulCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> HeedfulOutput | tuple:
        """Next-token logits, and the loss where labels are given.

        In training mode the loss includes the memory loss of the layers that have one (`--score.memory-loss`):
        its mean over rows and layers. Where `num_items_in_batch` says that these rows are a part of a larger
        batch, each row counts by its share of the labelled tokens, as in the rest of the loss, so that the
        sum over the parts is the same however the batch is cut.

        Args:
            input_ids: (B, T) token ids; or give `inputs_embeds` (B, T, C).
            attention_mask: (B, S) of 1 = real and 0 = padding, over cached and new tokens.
            position_ids: (B, T); default: counted over the real tokens of each row and segment. Without a
                mask or a cache, positions that start over mark packed documents, as `segment_ids` do.
            past_key_values: what an earlier call returned.
            inputs_embeds: (B, T, C) embeddings instead of ids.
            labels: (B, T) token ids, -100 = ignored; shifted inside, as in every causal LM here.
            use_cache: return a cache; default the config's, and never while gradients are on.
            segment_ids: (B, T) integers for packed documents: attention stays inside each.
            output_hidden_states: return the input of every layer and the last hidden state.
            logits_to_keep: compute logits for the last n positions only (0 = all), or for an index.
            **kwargs: `num_items_in_batch` for the loss; anything unknown raises.

        Raises:
            TypeError: for an unknown argument or a foreign cache.
            ValueError: if a shape does not fit.
        """
        self._check_kwargs(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, one of them")
        if use_cache is None:
            trains = self.training and labels is not None
            use_cache = self.config.use_cache and not torch.is_grad_enabled() and not trains
        cache = None
        if past_key_values is not None:
            cache = check_cache(past_key_values, len(self.layers))
        elif use_cache:
            cache = HeedfulCache(len(self.layers))
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, length = given.shape[:2]
        if position_ids is not None and segment_ids is None and attention_mask is None and cache is None:
            segment_ids = segments_of(position_ids, batch)
        if segment_ids is not None and cache is None and one_segment_each(segment_ids, (batch, length)):
            segment_ids = None  # attention without masks is faster
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        collected: list[Tensor] | None = [] if output_hidden_states else None
        losses: list[LayerLoss] | None = [] if self.training and labels is not None else None
        if losses is not None and cache is not None and self._trains_memory():
            raise ValueError(
                "the memory loss cannot be computed with a cache; leave out use_cache and the cache"
            )
        hidden = self.hidden_states(
            input_ids,
            embeds=inputs_embeds,
            positions=position_ids,
            key_mask=self._key_mask(attention_mask, batch, length, cache),
            segment_ids=segment_ids,
            caches=cache.memories if cache is not None else None,
            collect=collected,
            losses=losses,
        )
        if cache is not None:
            cache.tick()
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = memory_loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=items
            )
        if losses:
            assert loss is not None and labels is not None
            memory_loss = self._memory_loss(losses, labels, items)
            loss = loss + memory_loss
        output = HeedfulOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache or past_key_values is not None else None,
            hidden_states=tuple(collected) if collected is not None else None,
            memory_loss=None if memory_loss is None else memory_loss.detach(),
            kept_tokens=tuple(own.kept for own in losses) if losses else None,
        )
        return_dict = kwargs.get("return_dict")
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        kv_budget: Any = None,
        kv_policy: str = "selective",
        kv_evict_every: int = 1,
        kv_threshold: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate` with a bound on the tokens that the cache holds.

        Args:
            *args: as in transformers.
            kv_budget: tokens held per layer while attending, the first and the newest included: a number >= 2,
                a list with one per layer, or "full"; None takes `config.kv_budgets`, or all where it is None
                or the caller brings a cache or wants none.
            kv_policy: which token is evicted: "selective" needs a selective model; "streaming", "h2o",
                "tova" and "random" go with any.
            kv_evict_every: evict only at token positions divisible by it; up to kv_evict_every - 1 more tokens
                are held.
            kv_threshold: votes F above which a token goes at once, > 0; needs the policy "selective". The cache
                returned with the output then bounds the attention mass that was lost, `cache.forgotten`.
            **kwargs: as in transformers; `prefill_chunk_size` bounds what is held while the prompt is read to
                the budget and one chunk, and assisted decoding holds the budget and one draft after its first
                forward pass.

        Raises:
            ValueError: for an unsound budget or threshold, an unknown policy, or a budget or threshold together
                with a cache of one's own or `use_cache=False`.
        """
        get_policy(kv_policy)
        if kwargs.get("segment_ids") is not None:
            raise ValueError("generate() continues one text per row: leave out segment_ids")
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        use_cache = kwargs.get("use_cache", getattr(given, "use_cache", None))
        own_cache = kwargs.get("past_key_values") is not None or use_cache is False
        asked = kv_budget not in (None, "full") or kv_threshold is not None or kv_evict_every != 1
        if asked and own_cache:
            raise ValueError(
                "kv_budget, kv_threshold and kv_evict_every make a cache: leave out past_key_values and "
                "use_cache=False"
            )
        budget = self._budget(kv_budget)
        if (budget != "full" or asked) and not own_cache:
            kwargs["past_key_values"] = HeedfulCache(
                len(self.layers), budget, kv_policy, kv_evict_every, kv_threshold
            )
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def evaluate_nll(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        kv_budget: Any = None,
        policy: str = "selective",
        reduction: Literal["mean", "none"] = "mean",
        evict_every: int = 1,
        threshold: float | None = None,
    ) -> Tensor:
        """Negative log-likelihood of a text as a cache with a budget would see it, in one forward pass.

        The evictions are replayed exactly: the result is that of decoding token by token with `kv_budget`.

        Args:
            ids: (B, T) token ids.
            attention_mask: (B, T), 0 = padding, which is not counted.
            kv_budget: as in `generate`.
            policy: as `kv_policy` in `generate`; "h2o" and "tova" run query by query.
            reduction: "mean" over the real predicted tokens, or "none".
            evict_every: as `kv_evict_every` in `generate`.
            threshold: as `kv_threshold` in `generate`.

        Returns:
            A scalar, or (B, T-1), nats; 0 where the token is padding.

        Raises:
            ValueError: for an unsound budget, policy or reduction.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        cache = HeedfulCache(len(self.layers), self._budget(kv_budget), policy, evict_every, threshold)
        logits = self(ids, attention_mask=attention_mask, past_key_values=cache).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        if attention_mask is not None:
            counted = (attention_mask[:, 1:] * attention_mask[:, :-1]).bool()
            nll = nll.masked_fill(~counted, 0.0)
            return nll.sum() / counted.sum() if reduction == "mean" else nll
        return nll.mean() if reduction == "mean" else nll

    def _trains_memory(self) -> bool:
        options = self.config.score_options
        return any(o.get("memory_loss") for o in (options if isinstance(options, list) else [options or {}]))

    def _memory_loss(self, losses: list[LayerLoss], labels: Tensor, items: Tensor | int | None) -> Tensor:
        """The layers' own losses, averaged over rows and layers."""
        rows = torch.stack([own.loss for own in losses]).sum(0) / len(self.layers)
        counted = (labels[:, 1:] != -100).sum(-1)
        loss = rows.mean() if items is None else (rows * counted).sum() / items
        if torch.is_grad_enabled() and self.gradient_checkpointing and not loss.requires_grad:
            raise ValueError(
                "the memory loss has no gradient under reentrant gradient checkpointing; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return loss

    def _budget(self, kv_budget: Any) -> Any:
        if kv_budget is None:
            kv_budget = self.config.kv_budgets
        return "full" if kv_budget is None else kv_budget

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Continuous batching needs paged attention: without this it would fail in a thread, unheard."""
        raise NotImplementedError(
            "continuous batching and paged caches are not supported; use generate() with its own cache"
        )

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
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            check_cache(cache, len(self.layers))
        elif generation_config.use_cache:
            cache = model_kwargs["past_key_values"] = HeedfulCache(len(self.layers))
        for memory in cache.memories if cache is not None else []:
            # Assisted decoding turns it on; a cache that comes from there must not go on recording.
            memory.recording = bool(generation_config.is_assistant)

    def _check_kwargs(self, kwargs: dict[str, Any]) -> None:
        unknown = set(kwargs) - _PASSED_ALONG
        if unknown:
            # Continuous batching, for one, passes `cache=` and expects paged attention.
            raise TypeError(
                f"HeedfulForCausalLM.forward got unknown arguments {sorted(unknown)}; paged caches and "
                f"continuous batching are not supported"
            )
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is not supported: attention weights are never kept")

    def _key_mask(
        self, attention_mask: Tensor | None, batch: int, length: int, cache: HeedfulCache | None
    ) -> Tensor | None:
        """The new tokens' part of the mask; None where nothing was ever padded, which is faster."""
        if attention_mask is None:
            return None
        expected = (batch, length + (cache.seen if cache is not None else 0))
        if tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"attention_mask must cover cached and new tokens, shape {expected}, "
                f"got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask[:, -length:].bool()
        padded = cache is not None and cache.memories[0].padded
        if padded or torch.compiler.is_compiling():
            return mask
        # Asking a device would make every decoding step wait for it; new tokens of generate() are real.
        waits = mask.device.type != "cpu" and length == 1 and cache is not None and cache.seen
        return mask if waits or not bool(mask.all()) else None


def one_segment_each(segment_ids: Tensor, shape: tuple[int, int]) -> bool:
    """Whether sound segment ids, (B, T) integers, say nothing: every row is one document."""
    sound = tuple(segment_ids.shape) == shape and segment_ids.dtype in (torch.int32, torch.int64)
    if not sound or torch.compiler.is_compiling():
        return False
    return bool((segment_ids == segment_ids[:, :1]).all())


def segments_of(position_ids: Tensor, batch: int) -> Tensor | None:
    """Segment ids (B, T) of packed documents, whose positions start over; None where none do."""
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not torch.compiler.is_compiling() and not bool(breaks.any()):
        return None
    segments = torch.nn.functional.pad(breaks.long().cumsum(-1), (1, 0))
    return segments.expand(batch, -1)

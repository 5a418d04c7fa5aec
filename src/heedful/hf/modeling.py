"""`HeedfulForCausalLM`: the decoder as a Hugging Face causal language model."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from heedful.decoder import DecoderParts
from heedful.hf.cache import HeedfulCache, check_cache
from heedful.hf.configuration import HeedfulConfig

# What Trainer and generate pass along and this model may ignore or hands to the loss.
_PASSED_ALONG = {"num_items_in_batch", "return_dict", "cache_position", "output_attentions"}


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
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids: (B, T) token ids; or give `inputs_embeds` (B, T, C).
            attention_mask: (B, S) of 1 = real and 0 = padding, over cached and new tokens.
            position_ids: (B, T); default: counted over the real tokens of each row and segment.
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
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        cache = None
        if past_key_values is not None:
            cache = check_cache(past_key_values, len(self.layers))
        elif use_cache:
            cache = HeedfulCache(len(self.layers))
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, length = given.shape[:2]
        collected: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.hidden_states(
            input_ids,
            embeds=inputs_embeds,
            positions=position_ids,
            key_mask=self._key_mask(attention_mask, batch, length, cache),
            segment_ids=segment_ids,
            caches=cache.memories if cache is not None else None,
            collect=collected,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss_kwargs = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache or past_key_values is not None else None,
            hidden_states=tuple(collected) if collected is not None else None,
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
            model_kwargs["past_key_values"] = HeedfulCache(len(self.layers))

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
        padded = cache is not None and "key_mask" in cache.memories[0].masks
        if not padded and not torch.compiler.is_compiling() and bool(mask.all()):
            return None
        return mask

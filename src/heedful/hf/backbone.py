"""`HeedfulModel`: the decoder without its output projection, as a Hugging Face model."""

from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast

from heedful.attention.score import LayerLoss
from heedful.decoder import DecoderParts, reset_head
from heedful.hf.cache import HeedfulCache, check_cache
from heedful.hf.configuration import HeedfulConfig
from heedful.hf.names import CACHE, one_cache
from heedful.hf.packing import one_segment_each, segments_of, segments_of_lengths
from heedful.hf.saved import replacing_weights, write_beside

# What Trainer, generate and collators pass along and this model has no use for.
_IGNORED = {"cache_position", "return_dict", "output_attentions", "max_length_q", "max_length_k"}


class HeedfulPreTrainedModel(PreTrainedModel):
    """What all Hugging Face faces of the decoder have in common."""

    config_class = HeedfulConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, DecoderParts):
            module.reset_module(module)
        elif isinstance(module, HeedfulPreTrainedModel):
            module.reset_own()
        else:
            DecoderParts.reset_module(self, module)  # type: ignore[arg-type]

    def _initialize_weights(self, module: torch.nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers this skips every module without parameters of its own, Block among
        # them. Ours resets through torch.nn.init, where loaded parameters are marked and left alone.
        super()._initialize_weights(module, False)

    def reset_own(self) -> None:
        """Fresh weights for what stands on top of the backbone."""

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As in transformers; the folder also gets a model card, and a module by which it loads anywhere.

        `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs no import of
        `heedful.hf` then, only heedful installed. A README.md that is there is left alone.
        """
        if is_main_process and not Path(save_directory).is_file():
            write_beside(self, Path(save_directory))
        with replacing_weights(Path(save_directory)) if is_main_process else nullcontext():
            super().save_pretrained(save_directory, is_main_process, **kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Raises a ValueError but for "eager", transformers' name of a model's own attention."""
        by_part = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        for name in by_part.values():
            self._check_and_adjust_attn_implementation(name)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation not in (None, "eager"):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is not supported: "
                "heedful computes its own attention; leave it out, and say in the config "
                "how a score is computed: score_options={'impl': ...}"
            )
        return "eager"

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: transformers would copy the source of this class into every saved folder."""


class HeedfulModel(HeedfulPreTrainedModel, DecoderParts):
    """The decoder up to its last norm.

    The parameter names are those of `heedful.Decoder`, without the output projection `lm_head`.
    """

    def __init__(self, config: HeedfulConfig) -> None:
        super().__init__(config)
        self.add_parts(config.to_decoder_config())
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HeedfulCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        cache: HeedfulCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        losses: list[LayerLoss] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Token ids (B, T), or embeddings (B, T, C), to the last hidden states (B, T, C), normed.

        Args:
            input_ids: (B, T) token ids; or give `inputs_embeds` (B, T, C).
            attention_mask: (B, S) of 1 = real and 0 = padding, over cached and new tokens.
            position_ids: (B, T); default: counted over the real tokens of each row and segment. Without a
                mask or a cache, positions that start over mark packed documents, as `segment_ids` do.
            past_key_values: what an earlier call returned; `cache` is its name from transformers 5.24 on, and
                either works with any.
            inputs_embeds: (B, T, C) embeddings instead of ids.
            use_cache: return a cache; default the config's, and never while gradients are on.
            segment_ids: (B, T) integers for packed documents: attention stays inside each.
            output_hidden_states: return the input of every layer and the last hidden state.
            cache: see `past_key_values`.
            cu_seq_lens_q: (documents + 1,) where packed documents of one row begin and end, from 0 to T.
            cu_seq_lens_k: the same again, as collators pass it.
            seq_idx: another name of `segment_ids`.
            losses: a list that receives the layers' own losses.
            **kwargs: what Trainer and generate pass along; anything unknown raises.

        Raises:
            TypeError: for an unknown argument or a foreign cache, paged ones among them.
            ValueError: if a shape does not fit, or for `output_attentions`.
        """
        check_kwargs(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, one of them")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, length = given.shape[:2]
        cache = one_cache(past_key_values, cache)
        if cache is not None:
            check_cache(cache, len(self.layers))
        elif segment_ids is None:
            segment_ids = seq_idx
            if cu_seq_lens_q is not None:
                segment_ids = segments_of_lengths(cu_seq_lens_q, cu_seq_lens_k, batch, length)
            elif position_ids is not None and attention_mask is None and segment_ids is None:
                segment_ids = segments_of(position_ids, batch)
        if segment_ids is not None and cache is None and one_segment_each(segment_ids, (batch, length)):
            segment_ids = None  # attention without masks is faster
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if use_cache and cache is None:
            cache = HeedfulCache(len(self.layers))
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        collected: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.hidden_states(
            input_ids,
            embeds=inputs_embeds,
            positions=position_ids,
            key_mask=key_mask(attention_mask, batch, length, cache),
            segment_ids=segment_ids,
            caches=cache.memories if cache is not None else None,
            collect=collected,
            losses=losses,
        )
        if cache is not None:
            cache.tick()
        more: dict[str, Any] = {CACHE: cache}
        if collected is not None:
            more["hidden_states"] = tuple(collected)
        output = BaseModelOutputWithPast(last_hidden_state=hidden, **more)
        return output if returns_dict(self, kwargs) else output.to_tuple()


class HeedfulForSequenceClassification(GenericForSequenceClassification, HeedfulPreTrainedModel):
    """One label per sequence, read from its last real token: transformers' generic head on `HeedfulModel`."""

    score: torch.nn.Linear

    def reset_own(self) -> None:
        """Fresh weights for the head."""
        reset_head(self.score)


def check_kwargs(model: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise for arguments of `forward` that would be lost without a word."""
    if unknown := set(kwargs) - _IGNORED:
        raise TypeError(f"{type(model).__name__}.forward got unknown arguments {sorted(unknown)}")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions is not supported: attention weights are never kept")


def returns_dict(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether `forward` returns an object rather than a tuple."""
    asked = kwargs.get("return_dict")
    return bool(getattr(model.config, "return_dict", True) if asked is None else asked)


def key_mask(
    attention_mask: Tensor | None, batch: int, length: int, cache: HeedfulCache | None
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

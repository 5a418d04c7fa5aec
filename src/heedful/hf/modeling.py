"""`HeedfulForCausalLM`: the decoder as a Hugging Face causal language model."""

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from heedful.attention.eviction import Eviction
from heedful.attention.score import LayerLoss
from heedful.decoder import reset_head
from heedful.hf.backbone import HeedfulModel, HeedfulPreTrainedModel, returns_dict
from heedful.hf.budgeted import BudgetedGenerationMixin
from heedful.hf.cache import HeedfulCache
from heedful.hf.configuration import HeedfulConfig
from heedful.hf.names import CACHE, one_cache, output_cache

PREFIX = "model."


@dataclass
class HeedfulOutput(CausalLMOutputWithPast):
    """What `HeedfulForCausalLM.forward` returns."""

    memory_loss: Tensor | None = None
    """The part of `loss` that is the memory loss, in training; detached."""
    kept_tokens: tuple[Tensor, ...] | None = None
    """(B, T) per layer that trains a memory loss: the tokens each query still holds, softly counted."""


class HeedfulForCausalLM(HeedfulPreTrainedModel, BudgetedGenerationMixin):
    """A causal language model with any registered attention and score.

    Trains with `Trainer`, samples with `generate`, saves as config.json and safetensors. Weights under the
    names of `heedful.Decoder`, as they were saved before there was a backbone, load as well.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HeedfulConfig) -> None:
        super().__init__(config)
        # The projection is drawn first, so that a seed gives the weights that it gives a Decoder.
        lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.model = HeedfulModel(config)
        self.lm_head = lm_head
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_load_state_dict_pre_hook(_rename_decoder_weights)
        self.post_init()

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; a `kv_budget` of the generation config is kept, too."""
        self.keep_kv_settings()
        super().save_pretrained(save_directory, *args, **kwargs)

    def reset_own(self) -> None:
        """Fresh weights for the output projection, unless it is the embedding."""
        if self.lm_head.weight is not self.model.embed_tokens.weight:
            reset_head(self.lm_head)

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The blocks of the backbone."""
        return self.model.layers

    @property
    def embed_tokens(self) -> torch.nn.Embedding:
        """The token embedding of the backbone."""
        return self.model.embed_tokens

    @property
    def norm(self) -> torch.nn.RMSNorm:
        """The last norm of the backbone."""
        return self.model.norm

    def hidden_states(self, *args: Any, **kwargs: Any) -> Tensor:
        """`DecoderParts.hidden_states` of the backbone."""
        return self.model.hidden_states(*args, **kwargs)

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
        cache: HeedfulCache | None = None,
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
            past_key_values: what an earlier call returned; `cache` is its name from transformers 5.24 on, and
                either works with any.
            inputs_embeds: (B, T, C) embeddings instead of ids.
            labels: (B, T) token ids, -100 = ignored; shifted inside, as in every causal LM here.
            use_cache: return a cache; default the config's, and never while gradients are on.
            segment_ids: (B, T) integers for packed documents: attention stays inside each.
            output_hidden_states: return the input of every layer and the last hidden state.
            logits_to_keep: compute logits for the last n positions only (0 = all), or for an index.
            cache: see `past_key_values`.
            **kwargs: `num_items_in_batch` for the loss; what collators say of packed documents
                (`HeedfulModel.forward`); anything unknown raises.

        Raises:
            TypeError: for an unknown argument or a foreign cache, paged ones among them.
            ValueError: if a shape does not fit, or for `output_attentions`.
        """
        items = kwargs.pop("num_items_in_batch", None)
        with_tuple = not returns_dict(self, kwargs)
        cache = one_cache(past_key_values, cache)
        trains = self.training and labels is not None
        losses: list[LayerLoss] | None = [] if trains else None
        if use_cache is None and trains:
            use_cache = False
        if trains and (use_cache or cache is not None) and self._trains_memory():
            raise ValueError(
                "the memory loss cannot be computed with a cache; leave out use_cache and the cache"
            )
        below: Any = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_hidden_states=output_hidden_states,
            cache=cache,
            losses=losses,
            **{**kwargs, "return_dict": True},
        )
        hidden = below.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = memory_loss = None
        if labels is not None:
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
            hidden_states=below.hidden_states,
            memory_loss=None if memory_loss is None else memory_loss.detach(),
            kept_tokens=tuple(own.kept for own in losses) if losses else None,
            **{CACHE: output_cache(below)},
        )
        return output.to_tuple() if with_tuple else output

    @property
    def scores(self) -> list[Any]:
        """The score of every layer."""
        layers: Any = self.layers
        return [block.attention.score for block in layers]

    def new_cache(self, eviction: Eviction) -> HeedfulCache:
        """An empty cache for this model that evicts as told."""
        return HeedfulCache(len(self.layers), eviction)

    def _trains_memory(self) -> bool:
        options = self.config.score_options
        return any(o.get("memory_loss") for o in (options if isinstance(options, list) else [options or {}]))

    def _memory_loss(self, losses: list[LayerLoss], labels: Tensor, items: Tensor | int | None) -> Tensor:
        """The layers' own losses, averaged over rows and layers."""
        rows = torch.stack([own.loss for own in losses]).sum(0) / len(self.layers)
        counted = (labels[:, 1:] != -100).sum(-1)
        loss = rows.mean() if items is None else (rows * counted).sum() / items
        if torch.is_grad_enabled() and self.model.gradient_checkpointing and not loss.requires_grad:
            raise ValueError(
                "the memory loss has no gradient under reentrant gradient checkpointing; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return loss


def hugging_face_name(name: str) -> str:
    """The name of a weight of `Decoder` in `HeedfulForCausalLM`; a name that is one already stays."""
    return name if name.startswith((PREFIX, "lm_head.")) else PREFIX + name


def _rename_decoder_weights(model: torch.nn.Module, weights: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let `load_state_dict` take the weights of a `Decoder`."""
    flat = "layers.", "embed_tokens.", "embed_positions.", "norm."
    for name in [name for name in weights if name.removeprefix(prefix).startswith(flat)]:
        weights[prefix + hugging_face_name(name.removeprefix(prefix))] = weights.pop(name)

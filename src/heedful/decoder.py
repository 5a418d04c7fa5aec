"""A decoder-only language model whose attention and score are chosen by name; torch only.

Pre-norm RMSNorm, SwiGLU, rotary, learned or no positions: the common ground of today's small models,
so that a comparison of attention forms compares nothing else. Or GPT-2's block, to meet results published with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from inspect import Parameter, Signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from heedful.attention.base import Attention
from heedful.attention.cache import KVCache, LayerCache
from heedful.attention.config import (
    AttentionConfig,
    HeadOptions,
    check_options,
    inherit,
    option,
    own_fields,
    required,
)
from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.attention.score import LayerLoss
from heedful.attention.signature import check_keywords, config_parameters
from heedful.ops.checks import check_choice, check_most, check_tensor
from heedful.ops.masks import rank_in_segment

MOST_LAYERS, MOST_SIZE = 1024, 2**28
"""What a config may ask for: blocks; tokens, positions and features of one kind."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(HeadOptions):
    """The whole model. `attention` and `score` are names, with options; or lists, one per layer."""

    vocab_size: int = required("number of tokens")
    n_layers: int = required("number of blocks")
    block: Literal["llama", "gpt"] = option(
        "llama", "llama: RMSNorm and SwiGLU; gpt: LayerNorm without bias and GELU"
    )
    d_ff: int | None = option(
        None, "width of the MLP; if None 8/3 of d_model, rounded to 16s, or 4 times d_model in a gpt block"
    )
    max_positions: int = option(2048, "longest sequence; learned positions need it")
    attention: str | list[str] = option("mha", "attention form, for all layers or one per layer")
    attention_options: dict[str, Any] | list[dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "options of the attention form, likewise"}
    )
    score: str | list[str] = option("softmax", "score form, for all layers or one per layer")
    score_options: dict[str, Any] | list[dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "options of the score form, likewise"}
    )
    positions: Literal["rope", "learned", "none"] = option("rope", "rope, learned or none")
    attention_bias: bool = inherit(AttentionConfig, "bias")
    tie_embeddings: bool = option(True, "the output projection is the token embedding")
    dropout: float = option(0.0, "part of each attention and MLP output that is dropped in training")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
            check_most(name, value, MOST_LAYERS if name == "n_layers" else MOST_SIZE)
        check_choice("block", self.block, ("llama", "gpt"))
        if self.d_ff is None:
            wide = 4 * self.d_model if self.block == "gpt" else -(-8 * self.d_model // 3 // 16) * 16
            object.__setattr__(self, "d_ff", wide)
        elif not isinstance(self.d_ff, int) or self.d_ff < 1:
            raise ValueError(f"d_ff must be a whole number >= 1, got {self.d_ff!r}")
        else:
            check_most("d_ff", self.d_ff, MOST_SIZE)
        check_choice("positions", self.positions, ("rope", "learned", "none"))
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number from 0 to below 1, got {self.dropout!r}")
        self.attention_configs()

    def attention_configs(self) -> list[AttentionConfig]:
        """The config of each layer's attention; raises for contradictions."""
        return [self._attention_config(layer) for layer in range(self.n_layers)]

    @property
    def mlp_matrices(self) -> int:
        """Matrices of an MLP, d_model x d_ff each."""
        return 2 if self.block == "gpt" else 3

    def norm(self) -> "nn.RMSNorm | nn.LayerNorm":
        """A norm of the residual stream."""
        if self.block == "gpt":
            return nn.LayerNorm(self.d_model, eps=self.norm_eps, bias=False)
        return nn.RMSNorm(self.d_model, eps=self.norm_eps)

    def parameter_count(self) -> int:
        """The number of learned parameters, exactly; a tied embedding counts once."""
        ff = self.d_ff or 0
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        if self.positions == "learned":
            embeddings += self.max_positions * self.d_model
        layers = sum(c.parameter_count() for c in self.attention_configs())
        blocks = self.n_layers * (self.mlp_matrices * ff + 2) * self.d_model
        return embeddings + layers + blocks + self.d_model

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs per token at a full `context`; a multiply-add is 2. Training costs three times it."""
        attention = sum(c.flops_per_token(context) for c in self.attention_configs())
        mlp = self.n_layers * 2 * self.mlp_matrices * (self.d_ff or 0) * self.d_model
        return attention + mlp + 2 * self.vocab_size * self.d_model

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Bytes one cached token takes in all layers."""
        return sum(c.cache_bytes_per_token(bytes_per_value) for c in self.attention_configs())

    def _attention_config(self, layer: int) -> AttentionConfig:
        attention = self._per_layer("attention", layer)
        score = self._per_layer("score", layer)
        options = self._per_layer("attention_options", layer)
        score_class = SCORES[score].config_class
        attention_class = ATTENTIONS[attention].config_class
        _check_own("attention", attention, options, attention_class)
        score_options = self._per_layer("score_options", layer)
        _check_own("score", score, score_options, score_class)
        return attention_class(
            **{f.name: getattr(self, f.name) for f in fields(HeadOptions)},
            score=score_class(**score_options),
            rope=self.positions == "rope",
            bias=self.attention_bias,
            **options,
        )

    def _per_layer(self, name: str, layer: int) -> Any:
        value = getattr(self, name)
        if not isinstance(value, list | tuple):
            return value
        if len(value) != self.n_layers:
            raise ValueError(f"{name} must have one entry per layer ({self.n_layers}), got {len(value)}")
        return value[layer]


def _check_own(kind: str, name: str, options: dict[str, Any], config_class: type) -> None:
    """Raise for options that are not the form's own: the model sets the shared ones."""
    check_options(f"{kind} {name!r}", options, [f.name for f in own_fields(config_class)])


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), (B, T, C) -> (B, T, C); Shazeer, arXiv 2002.05202."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELUMLP(nn.Module):
    """down(gelu(up(x))), (B, T, C) -> (B, T, C); as in GPT-2, without biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    """x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x)))."""

    def __init__(self, config: DecoderConfig, attention: AttentionConfig) -> None:
        super().__init__()
        self.n_layers = config.n_layers
        self.attention_norm = config.norm()
        self.attention: Attention = attention.build()
        self.mlp_norm = config.norm()
        mlp = GELUMLP if config.block == "gpt" else SwiGLU
        self.mlp = mlp(config.d_model, config.d_ff or 0)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        key_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
        losses: list[LayerLoss] | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); the other arguments go to the attention."""
        attended = self.attention(
            self.attention_norm(x),
            positions=positions,
            key_mask=key_mask,
            segment_ids=segment_ids,
            cache=cache,
            losses=losses,
        )
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def reset_parameters(self) -> None:
        """Fresh weights; what adds to the residual stream starts 1/sqrt(2 n_layers) smaller."""
        self.attention.reset_parameters()
        for linear in (*self.mlp.children(), self.attention.o_proj):
            assert isinstance(linear, nn.Linear)
            shrink = linear in (self.mlp.down_proj, self.attention.o_proj)
            std = linear.in_features**-0.5 * ((2 * self.n_layers) ** -0.5 if shrink else 1.0)
            nn.init.normal_(linear.weight, std=std)
        nn.init.ones_(self.attention_norm.weight)
        nn.init.ones_(self.mlp_norm.weight)


class DecoderParts(nn.Module):
    """The layers below the output projection and the way through them, shared by every face of the model.

    `Decoder` is this with a constructor and the projection; `heedful.hf.HeedfulModel` is this with
    transformers' constructor.
    """

    embed_tokens: nn.Embedding
    embed_positions: nn.Embedding | None
    layers: nn.ModuleList
    norm: nn.RMSNorm | nn.LayerNorm
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Callable[..., Any]

    def add_parts(self, config: DecoderConfig) -> None:
        """Build the layers; called once, by the constructor."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.embed_positions = nn.Embedding(config.max_positions, config.d_model) if learned else None
        self.layers = nn.ModuleList(Block(config, c) for c in config.attention_configs())
        self.norm = config.norm()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = _checkpoint

    def new_cache(self) -> list[KVCache]:
        """An empty cache for each layer."""
        return [LayerCache() for _ in self.layers]

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        *,
        embeds: Tensor | None = None,
        positions: Tensor | None = None,
        key_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        caches: list[KVCache] | None = None,
        collect: list[Tensor] | None = None,
        losses: list[LayerLoss] | None = None,
    ) -> Tensor:
        """Token ids (B, T), or embeddings (B, T, C), to the normed last hidden states (B, T, C).

        Args:
            input_ids: (B, T) token ids.
            embeds: (B, T, C), instead of `input_ids`.
            positions: (1 or B, T); default: counted over the real tokens of each row and segment.
            key_mask: (B, T) bool, False = padding.
            segment_ids: (B, T) integers for packed documents.
            caches: one per layer; the new tokens are added.
            collect: a list that receives the input of every layer and the result.
            losses: a list that receives the own losses of the layers whose scores train one.

        Raises:
            ValueError: if a learned position is out of range.
        """
        if embeds is None:
            assert input_ids is not None
            check_tensor("input_ids", input_ids, "(B, T)")
            embeds = self.embed_tokens(input_ids)
        batch, length, _ = embeds.shape
        if caches is not None and len({id(cache) for cache in caches}) != len(self.layers):
            raise ValueError(
                f"caches must be one cache of its own for each of the {len(self.layers)} layers; use new_cache()"
            )
        if positions is None:
            positions = self._positions(batch, length, key_mask, segment_ids, caches, embeds.device)
        x = embeds
        if self.embed_positions is not None:
            if key_mask is not None:  # padding may carry any position; it must only stay inside the table
                positions = positions.expand(batch, -1).masked_fill(~key_mask, 0)
            longest = self.embed_positions.num_embeddings
            if length and not torch.compiler.is_compiling() and int(positions.max()) >= longest:
                raise ValueError(
                    f"learned positions end at {longest}, got a sequence of {int(positions.max()) + 1} "
                    f"tokens; shorten it or build the model with more positions"
                )
            x = x + self.embed_positions(positions)
        for i, layer in enumerate(self.layers):
            if collect is not None:
                collect.append(x)
            cache = caches[i] if caches is not None else None
            if self.gradient_checkpointing and self.training and cache is None:
                x = self._gradient_checkpointing_func(
                    layer, x, positions, key_mask, segment_ids, None, losses
                )
            else:
                x = layer(x, positions, key_mask, segment_ids, cache, losses)
        x = self.norm(x)
        if collect is not None:
            collect.append(x)
        return x

    def reset_module(self, module: nn.Module) -> None:
        """Fresh weights for one module of the tree; parents come after, and overrule, their children."""
        if isinstance(module, nn.Embedding):
            # 1/sqrt(C): a tied output then starts with logits of unit variance. At small sizes this learns
            # faster than the customary 0.02.
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, Attention | Block):
            module.reset_parameters()
        elif isinstance(module, DecoderParts):
            nn.init.ones_(module.norm.weight)

    def _positions(
        self,
        batch: int,
        length: int,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        caches: list[KVCache] | None,
        device: torch.device,
    ) -> Tensor:
        if caches:
            return caches[0].next_positions(key_mask, segment_ids, batch, length, device)
        return rank_in_segment(length, key_mask, segment_ids, device)


class Decoder(DecoderParts):
    """The language model as a plain `nn.Module`, for people with a trainer of their own.

    Args:
        config: a `DecoderConfig`, or None to give its fields by name.
        **fields: the fields of `DecoderConfig`.

    Raises:
        TypeError: for an argument that is no field of the config, saying what it could have been.
        ValueError: for a value that does not fit.
    """

    __signature__ = Signature(
        [
            Parameter(
                "config", Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=DecoderConfig | None
            ),
            *(p.replace(kind=Parameter.KEYWORD_ONLY) for p in config_parameters(DecoderConfig)),
        ]
    )

    def __init__(self, config: DecoderConfig | None = None, **fields: Any) -> None:
        super().__init__()
        if config is not None and fields:
            raise TypeError(f"Decoder takes a config or its fields, not both; got {sorted(fields)} as well")
        check_keywords("Decoder", fields, DecoderConfig)
        self.config = config if config is not None else DecoderConfig(**fields)
        self.add_parts(self.config)
        self.lm_head = nn.Linear(self.config.d_model, self.config.vocab_size, bias=False)
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.apply(self.reset_module)
        if not self.config.tie_embeddings:
            reset_head(self.lm_head)

    def forward(
        self,
        input_ids: Tensor,
        *,
        key_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            input_ids: (B, T) token ids.
            key_mask: (B, T) bool, False = padding.
            segment_ids: (B, T) integers; attention stays inside a segment.
            caches: `decoder.new_cache()` at first, then the same list for the tokens that follow.

        Returns:
            (B, T, vocab_size).
        """
        hidden = self.hidden_states(input_ids, key_mask=key_mask, segment_ids=segment_ids, caches=caches)
        return self.lm_head(hidden)


def reset_head(head: nn.Linear) -> None:
    """Fresh weights for a projection from the last hidden states: outputs of unit variance."""
    nn.init.normal_(head.weight, std=head.in_features**-0.5)


def _checkpoint(layer: nn.Module, *args: Any) -> Any:
    return checkpoint(layer, *args, use_reentrant=False)

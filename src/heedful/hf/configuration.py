"""The model's config in Hugging Face terms, translated to the decoder's."""

from dataclasses import fields
from typing import Any, Literal

from transformers import PreTrainedConfig

from heedful.attention.eviction import Eviction
from heedful.decoder import DecoderConfig
from heedful.ops.checks import did_you_mean


class HeedfulConfig(PreTrainedConfig):
    """Config of `HeedfulForCausalLM`.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the model.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key/value heads; None means all for mha and sas and 1 for mqa, and
            gqa needs it said.
        head_dim: size of a head; None means hidden_size / num_attention_heads.
        block: "llama" (RMSNorm and SwiGLU) or "gpt" (LayerNorm without bias and GELU).
        intermediate_size: width of the MLP; None means 8/3 of hidden_size, rounded up to 16s, or 4 times it in
            a gpt block.
        max_position_embeddings: longest sequence; learned positions need it.
        attention: attention form by name, for all layers or one per layer (`heedful.available()`).
        attention_options: options of the form, e.g. `{"sim_heads": 36}`; likewise one or a list.
        score: score form by name, likewise.
        score_options: options of the score, likewise.
        positions: "rope", "learned" or "none".
        rope_theta: base of the rotary frequencies.
        qk_norm: RMS-normalise queries and keys; None means as the form does by default.
        qk_norm_position: "before_rope" or "after_rope".
        rms_norm_eps: epsilon of every norm.
        attention_bias: bias in the q, k, v and output projections.
        init_logit_std: standard deviation of the attention logits at the start.
        tie_word_embeddings: the output projection is the token embedding.
        dropout: part of each attention and MLP output that is dropped in training.
        eviction: what `generate` and `evaluate_nll` hold in the cache where nothing else is asked for, as
            `heedful.Eviction.to_dict` gives it: budget, policy, evict_every, threshold, grace, first. None keeps
            all.

    Raises:
        ValueError: for unknown forms or options and for contradictions, at construction.
    """

    model_type = "heedful"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = DecoderConfig.n_kv_heads
    head_dim: int | None = DecoderConfig.head_dim
    block: Literal["llama", "gpt"] = DecoderConfig.block
    intermediate_size: int | None = DecoderConfig.d_ff
    max_position_embeddings: int = DecoderConfig.max_positions
    attention: str | list[str] = DecoderConfig.attention
    attention_options: dict[str, Any] | list[dict[str, Any]] | None = None
    score: str | list[str] = DecoderConfig.score
    score_options: dict[str, Any] | list[dict[str, Any]] | None = None
    positions: Literal["rope", "learned", "none"] = DecoderConfig.positions
    rope_theta: float = DecoderConfig.rope_theta
    qk_norm: bool | None = DecoderConfig.qk_norm
    qk_norm_position: Literal["before_rope", "after_rope"] = DecoderConfig.qk_norm_position
    rms_norm_eps: float = DecoderConfig.norm_eps
    attention_bias: bool = DecoderConfig.attention_bias
    init_logit_std: float = DecoderConfig.init_logit_std
    tie_word_embeddings: bool = DecoderConfig.tie_embeddings
    dropout: float = DecoderConfig.dropout
    eviction: dict[str, Any] | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("kv_budgets") and self.eviction is None:
            self.eviction = {"budget": kwargs["kv_budgets"]}  # as folders of early versions have it
        kwargs.pop("kv_budgets", None)
        own = [f.name for f in fields(self)]
        for name in kwargs:
            if name in _OTHER_NAMES:
                raise ValueError(f"HeedfulConfig has no field {name!r}; here it is {_OTHER_NAMES[name]!r}")
        for name in kwargs:
            # Unknown names are kept, as everywhere in transformers, but a typo must not be one.
            if hint := did_you_mean(name, own, cutoff=0.85):
                raise ValueError(f"HeedfulConfig has no field {name!r}; {hint}".rstrip())
        for name in ("rope_parameters", "rope_scaling"):
            if kwargs.get(name):
                raise ValueError(f"HeedfulConfig has no {name}; set rope_theta")
        if self.attention_options is None:
            self.attention_options = {}
        if self.score_options is None:
            self.score_options = {}
        decoder = self.to_decoder_config()
        if self.eviction is not None:
            eviction = Eviction.of(self.eviction)
            eviction.budgets(self.num_hidden_layers)
            self.eviction = eviction.to_dict()
        self.intermediate_size = decoder.d_ff
        super().__post_init__(**kwargs)

    def to_decoder_config(self) -> DecoderConfig:
        """The same model in the decoder's terms."""
        return DecoderConfig(**{theirs: getattr(self, ours) for theirs, ours in _NAMES.items()})

    @classmethod
    def from_decoder_config(cls, config: DecoderConfig, **more: Any) -> "HeedfulConfig":
        """The config of the same model, from the decoder's terms; `more` is what the decoder has no word for."""
        return cls(**{ours: getattr(config, theirs) for theirs, ours in _NAMES.items()}, **more)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: transformers would copy the source of this class into every saved folder."""


_OTHER_NAMES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_NAMES = {f.name: _OTHER_NAMES.get(f.name, f.name) for f in fields(DecoderConfig)}
"""A field of `DecoderConfig` -> its name here."""

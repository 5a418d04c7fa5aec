"""Configs of forms: frozen dataclasses that know parameters and FLOPs before anything is built."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self, get_args

import torch

from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.ops.checks import check_choice, check_divides, check_most, did_you_mean

MOST = 2**24
"""Heads, features and tokens of one kind that a config may ask for."""


def option(default: Any, help: str) -> Any:
    """A dataclass field with its one line of documentation."""
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """A dataclass field without a default."""
    return field(metadata={"help": help})


def inherit(config_class: Any, name: str, **change: Any) -> Any:
    """The field `name` of another config, with its default and its help, so that both are written once.

    For a config of something larger that passes the value on.

    Args:
        config_class: the dataclass that has the option.
        name: the option.
        **change: `default` or `help`, where this place needs its own.
    """
    there = {f.name: f for f in fields(config_class)}[name]
    metadata = {"help": change.get("help", there.metadata["help"])}
    if "default" in change:
        return field(default=change["default"], metadata=metadata)
    return field(default=there.default, default_factory=there.default_factory, metadata=metadata)


def own_fields(config_class: Any) -> list:
    """The fields a form adds to its base config: its own options."""
    base = ScoreConfig if issubclass(config_class, ScoreConfig) else AttentionConfig
    shared = set() if base is ScoreConfig else {f.name for f in fields(base)}
    return [f for f in fields(config_class) if f.name not in shared]


def check_options(what: str, options: Mapping[str, Any], known: list[str]) -> None:
    """Raise for an option that nobody knows, naming the nearest one."""
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            have = f"options: {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"{what} has no option {name!r}; {hint}{have}")


def check_whole(name: str, value: Any) -> None:
    """Raise unless `value` is a whole number from 1 to `MOST`, or None."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and (not whole or value < 1):
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if value is not None:
        check_most(name, value, MOST)


def check_literals(config: Any) -> None:
    """Raise if a field typed `Literal["a", "b"]` holds something else."""
    for f in fields(config):
        choices = get_args(f.type)
        if choices and all(isinstance(c, str) for c in choices):
            check_choice(f.name, getattr(config, f.name), choices)


@lru_cache(maxsize=1024)
def _score_parameters(module_class: Any, config: "ScoreConfig", n_heads: int, d_model: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in module_class(config, n_heads, d_model).parameters())


@dataclass(frozen=True)
class ScoreConfig:
    """What happens to the logits."""

    form: ClassVar[str | None] = None
    implementations: ClassVar[tuple[str, ...]] = ("auto", "reference", "sdpa")

    impl: str = option("auto", "how it is computed: auto, reference (readable, slow) or sdpa")

    def __post_init__(self) -> None:
        check_choice("impl", self.impl, self.implementations)
        check_literals(self)

    def parameter_count(self, n_heads: int, d_model: int) -> int:
        """The number of learned parameters of the module, exactly.

        A score that does not override it is built once on the meta device, without memory, and counted.
        """
        if self.form is None:
            raise ValueError(f"{type(self).__name__} is not registered; use @register_score(name)")
        return _score_parameters(SCORES[self.form].module_class, self, n_heads, d_model)

    def flops_per_token(self, context: int, n_heads: int, qk_dim: int, v_dim: int, d_model: int) -> int:
        """FLOPs of the logits and of the weighted sum; a multiply-add is 2, the full square counts."""
        return 2 * context * n_heads * (qk_dim + v_dim)

    def state_bytes_per_token(self, n_heads: int, bytes_per_value: int = 4) -> int:
        """Bytes per cached token that the score adds to keys and values, which take `bytes_per_value` each."""
        return 0


@dataclass(frozen=True)
class HeadOptions:
    """What the attention of every layer of a model has in common."""

    d_model: int = required("width of the model, C")
    n_heads: int = required("number of query heads, H")
    _: KW_ONLY
    n_kv_heads: int | None = option(None, "number of key/value heads, G; the form's default if None")
    head_dim: int | None = option(None, "size of a head, D; d_model / n_heads if None")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    qk_norm: bool | None = option(
        None, "RMS-normalise queries and keys, after any expansion; None: as the form does by default"
    )
    qk_norm_position: Literal["before_rope", "after_rope"] = option(
        "before_rope", "where QK-norm sits: before_rope or after_rope"
    )
    norm_eps: float = option(1e-6, "epsilon of every norm")
    init_logit_std: float = option(
        0.2, "standard deviation of the logits at the start; selective attention needs it small"
    )


@dataclass(frozen=True)
class AttentionConfig(HeadOptions):
    """How q, k, v and the output are made. Forms add their own options as fields."""

    form: ClassVar[str | None] = None

    _: KW_ONLY
    score: ScoreConfig | str = option("softmax", "what happens to the logits: a name or a config")
    rope: bool = option(True, "rotate queries and keys by position, after any expansion")
    bias: bool = option(False, "bias in the q, k, v and output projections")

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "n_kv_heads", "head_dim"):
            check_whole(name, getattr(self, name))
        if self.head_dim is None:
            check_divides("d_model", self.d_model, "n_heads", self.n_heads)
            self._set("head_dim", self.d_model // self.n_heads)
        self._set("n_kv_heads", self.resolve_kv_heads())
        check_divides("n_heads", self.n_heads, "n_kv_heads", self.kv_heads)
        for name in ("init_logit_std", "rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number greater than 0, got {value!r}")
        if not isinstance(self.score, str | ScoreConfig):
            raise TypeError(f"score must be a name or the config of a score, got {self.score!r}")
        if isinstance(self.score, str):
            self._set("score", SCORES[self.score].config_class())
        check_literals(self)
        if self.qk_norm and self.no_qk_norm:
            raise ValueError(
                f"attention {self.form!r} has no QK-norm: {self.no_qk_norm}; leave qk_norm out, or give False"
            )
        if self.qk_norm is None:
            self._set("qk_norm", not self.no_qk_norm)
        self.check()
        size = self.rotated_dim
        if self.rope and size % 2:
            raise ValueError(
                f"rotary positions need an even {self.rotated_dim_name}, got {size}; "
                f"use {size - 1} or {size + 1}, or rope=False"
            )

    def check(self) -> None:
        """Check and resolve the form's own fields; called before the shared checks end."""

    def resolve_kv_heads(self) -> int:
        """The number of key/value heads: as many as query heads unless told otherwise."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    # The shape of the attention itself; a form that widens it overrides these.

    kv_heads_by_definition: ClassVar[bool] = False
    """Whether the form says how many key/value heads there are."""
    rotated_dim_name: ClassVar[str] = "head_dim"
    no_qk_norm: ClassVar[str] = ""
    """Why the form has no QK-norm; empty: it has, unless it is told otherwise."""

    @property
    def kv_heads(self) -> int:
        """G."""
        assert self.n_kv_heads is not None
        return self.n_kv_heads

    @property
    def size(self) -> int:
        """D, the size of a projected head."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def score_config(self) -> ScoreConfig:
        """The config of the score."""
        assert isinstance(self.score, ScoreConfig)
        return self.score

    @property
    def score_heads(self) -> int:
        """The number of heads that attend: H, or Ĥ for SAS."""
        return self.n_heads

    @property
    def score_kv_heads(self) -> int:
        """The number of key heads that are remembered apart, each of which a selector may have: G, or Ĥ for SAS."""
        return self.kv_heads

    @property
    def qk_dim(self) -> int:
        """The size of q and k where they meet: D, or D̂ for SAS."""
        return self.size

    @property
    def rotated_dim(self) -> int:
        """The size of what is rotated by position: all of q and k, or a part."""
        return self.qk_dim

    @property
    def v_dim(self) -> int:
        """The size of v and of a head's output."""
        return self.size

    def reference(self) -> Self:
        """The same, computed by the readable steps that define it."""
        return replace(self, score=replace(self.score_config, impl="reference"))

    # What it costs.

    def parameter_count(self) -> int:
        """The number of learned parameters of the module, exactly.

        A form that does not override it is built on the meta device, without memory, and counted.
        """
        with torch.device("meta"):
            return sum(p.numel() for p in self.build().parameters())

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs per token at a full `context` (T x S square); a multiply-add is 2.

        A form that does not override it is traced on the meta device, as `reference`.
        """
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            self.reference().build()(torch.zeros(1, context, self.d_model))
        return counter.get_total_flops() // context

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Bytes one cached token takes, its values in `bytes_per_value` (2, 4 or 8), the score's state added.

        A form that does not override it is run on one token on the meta device and measured.
        """
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[bytes_per_value]
        with torch.device("meta"):
            return self.build().to(dtype).measured_cache_bytes()

    def shared_parameter_count(self) -> int:
        """The parameters that the base class holds: output projection, QK-norm, the score's own."""
        out = (self.n_heads * self.v_dim + self.bias) * self.d_model
        norms = 2 * self.qk_dim if self.qk_norm else 0
        return out + norms + self.score_config.parameter_count(self.score_heads, self.d_model)

    def shared_flops_per_token(self, context: int) -> int:
        """The FLOPs of the score and of the output projection."""
        score = self.score_config.flops_per_token(
            context, self.score_heads, self.qk_dim, self.v_dim, self.d_model
        )
        return score + 2 * self.n_heads * self.v_dim * self.d_model

    def build(self) -> Any:
        """The module."""
        if self.form is None:
            raise ValueError(f"{type(self).__name__} is not registered; use @register_attention(name)")
        return ATTENTIONS[self.form].module_class(self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, attention: str, score: str = "softmax", **options: Any) -> Self:
        """The config of `attention` x `score`; every option goes to the form that has it.

        Raises:
            ValueError: for an unknown name or option.
        """
        attention_class, score_class = ATTENTIONS[attention].config_class, SCORES[score].config_class
        score_names = [f.name for f in fields(score_class)]
        names = [f.name for f in fields(attention_class) if f.name != "score"]
        check_options(f"{attention} x {score}", options, names + score_names)
        score_options = {k: v for k, v in options.items() if k in score_names}
        rest = {k: v for k, v in options.items() if k not in score_names}
        return attention_class(score=score_class(**score_options), **rest)

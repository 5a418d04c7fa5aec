"""What the config of a converted model says beside what its source's config says."""

from dataclasses import dataclass, field
from typing import Any

from heedful.attention.config import ScoreConfig, check_options
from heedful.attention.eviction import Eviction
from heedful.attention.registry import SCORES
from heedful.hf.converted.sas import OPTIONS, Sizes
from heedful.ops.checks import check_choice

FIELD = "heedful"
"""The field of the config that holds it."""


@dataclass(frozen=True)
class Conversion:
    """How the attention of a converted model differs from its source's.

    Raises:
        ValueError: for an unknown attention, score or option, or an unsound eviction.
    """

    score: str = "selective"
    """That of every layer that attends to all tokens; layers with a sliding window keep their own attention."""
    score_options: dict[str, Any] = field(default_factory=dict)
    """Its options."""
    eviction: dict[str, Any] | None = None
    """What `generate` and `evaluate_nll` hold where nothing else is asked for; None: every token."""
    source: dict[str, Any] = field(default_factory=dict)
    """config.json of the source, for the way back."""
    attention: str = "source"
    """Of every layer that attends to all tokens: the source's own heads, or "sas", which simulates more of them."""
    attention_options: dict[str, Any] = field(default_factory=dict)
    """Its options."""

    def __post_init__(self) -> None:
        if self.score_options.get("memory_loss"):
            raise ValueError(
                "memory_loss has no effect in a converted model, whose forward pass is its source's and asks no "
                "layer for a loss; leave it out"
            )
        check_choice("attention", self.attention, ("source", "sas"))
        known = OPTIONS if self.attention == "sas" else ()
        check_options(f"attention {self.attention!r}", self.attention_options, list(known))
        self.score_config()
        Eviction.of(self.eviction)

    def score_config(self) -> ScoreConfig:
        """The config of the score."""
        config_class = SCORES[self.score].config_class
        check_options(
            f"score {self.score!r}", self.score_options, [f for f in config_class.__dataclass_fields__]
        )
        return config_class(**self.score_options)

    def sizes(self, config: Any) -> Sizes | None:
        """Those of simulated heads in a model of this config; None where there are none.

        Raises:
            ValueError: if the options do not fit the model.
        """
        return Sizes.of(self.attention_options, config) if self.attention == "sas" else None

    @classmethod
    def of(cls, config: Any) -> "Conversion":
        """That of a model's config.

        Raises:
            ValueError: where it is missing or damaged.
        """
        given = getattr(config, FIELD, None)
        if not isinstance(given, dict) or set(given) - set(cls.__dataclass_fields__):
            raise ValueError(
                f"config.json of a converted model has a field {FIELD!r} with "
                f"{', '.join(cls.__dataclass_fields__)}, got {given!r}; convert the source again"
            )
        return cls(**given)

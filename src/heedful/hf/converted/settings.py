"""What the config of a converted model says beside what its source's config says."""

from dataclasses import dataclass, field
from typing import Any

from heedful.attention.config import ScoreConfig, check_options
from heedful.attention.eviction import Eviction
from heedful.attention.registry import SCORES

FIELD = "heedful"
"""The field of the config that holds it."""


@dataclass(frozen=True)
class Conversion:
    """How the attention of a converted model differs from its source's.

    Raises:
        ValueError: for an unknown score or option, or an unsound eviction.
    """

    score: str = "selective"
    """That of every layer that attends to all tokens; layers with a sliding window keep their own attention."""
    score_options: dict[str, Any] = field(default_factory=dict)
    """Its options."""
    eviction: dict[str, Any] | None = None
    """What `generate` and `evaluate_nll` hold where nothing else is asked for; None: every token."""
    source: dict[str, Any] = field(default_factory=dict)
    """config.json of the source, for the way back."""

    def __post_init__(self) -> None:
        if self.score_options.get("memory_loss"):
            raise ValueError(
                "memory_loss has no effect in a converted model, whose forward pass is its source's and asks no "
                "layer for a loss; leave it out"
            )
        self.score_config()
        Eviction.of(self.eviction)

    def score_config(self) -> ScoreConfig:
        """The config of the score."""
        config_class = SCORES[self.score].config_class
        check_options(
            f"score {self.score!r}", self.score_options, [f for f in config_class.__dataclass_fields__]
        )
        return config_class(**self.score_options)

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

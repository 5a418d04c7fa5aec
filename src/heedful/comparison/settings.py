"""What a comparison can be told."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Self

from heedful.attention.config import option, own_fields
from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.comparison.matching import Match, match_d_ff
from heedful.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Which forms, how often, and what is held equal."""

    attention: tuple[str, ...] = option(("mha", "sas"), "attention forms, separated by commas")
    score: tuple[str, ...] = option(("softmax", "selective"), "score forms, separated by commas")
    seeds: int = option(2, "runs of each form; seeds 0, 1, ... give weights and data order")
    match: Match = option(
        "none",
        "what is held equal to the first form: params or flops by the width of the SwiGLU, seconds by the steps",
    )
    lr_sweep: tuple[float, ...] = option(
        (), "learning rates to try on each form with a seed of its own; the best is used for all its seeds"
    )
    baseline_steps: tuple[int, ...] = option(
        (), "also train the first form for these numbers of steps: what the others' compute is worth"
    )
    train: TrainSettings = field(
        default_factory=TrainSettings, metadata={"help": "everything else, equal for all forms"}
    )

    def __post_init__(self) -> None:
        if not self.attention or not self.score:
            raise ValueError("--attention and --score need at least one form each")
        for name, values in (("attention", self.attention), ("score", self.score)):
            if len(set(values)) != len(values):
                raise ValueError(f"--{name} names a form twice: {','.join(values)}")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be 1 or more, got {self.seeds}")
        for lr in self.lr_sweep:
            if not 0 < lr < math.inf:
                raise ValueError(f"--lr-sweep needs learning rates greater than 0, got {lr}")
        for steps in self.baseline_steps:
            if steps < 1 or steps == self.train.steps:
                raise ValueError(
                    f"--baseline-steps needs numbers of steps other than --steps ({self.train.steps}), got {steps}"
                )
        self.forms(self.train.vocab_size, self.train.context)

    @property
    def first_form(self) -> str:
        """The baseline, as tables call it."""
        return f"{self.attention[0]} x {self.score[0]}"

    def forms(self, vocab_size: int, context: int) -> list[TrainSettings]:
        """The settings of every form, matched; raises for unknown forms and unreachable matches."""
        settings = [self._form(a, s) for a in self.attention for s in self.score]
        configs = [s.to_config(vocab_size, context).to_decoder_config() for s in settings]
        by = self.match
        if by == "none" or by == "seconds":
            return settings
        return settings[:1] + [
            dataclasses.replace(s, d_ff=match_d_ff(c, configs[0], by, context))
            for s, c in zip(settings[1:], configs[1:], strict=True)
        ]

    @classmethod
    def of(cls, **options: Any) -> Self:
        """The settings from one flat list: those of a comparison, and those of `TrainSettings` for all its runs.

        `attention_options` and `score_options` go to every form that has them; `attention`, `score` and
        `lr_sweep` may be one name or number instead of several.
        """
        own = {f.name: options.pop(f.name) for f in dataclasses.fields(cls) if f.name in options}
        for name in ("attention", "score", "lr_sweep", "baseline_steps"):
            if name in own:
                own[name] = (own[name],) if isinstance(own[name], str | float | int) else tuple(own[name])
        of_forms: dict[str, Any] = {
            name: options.pop(name, None) or {} for name in ("attention_options", "score_options")
        }
        of_forms["n_kv_heads"] = options.pop("n_kv_heads", None)
        train = TrainSettings(**options)  # without forms: their options are checked form by form
        for name, value in of_forms.items():
            object.__setattr__(train, name, value)
        return cls(train=train, **own)

    def _form(self, attention: str, score: str) -> TrainSettings:
        """An option goes to every form that has it, as does a number of key/value heads."""
        config_class = ATTENTIONS[attention].config_class
        others = any(not ATTENTIONS[name].config_class.kv_heads_by_definition for name in self.attention)
        return dataclasses.replace(
            self.train,
            attention=attention,
            n_kv_heads=None if others and config_class.kv_heads_by_definition else self.train.n_kv_heads,
            score=score,
            attention_options=_own(config_class, self.train.attention_options),
            score_options=_own(SCORES[score].config_class, self.train.score_options),
        )


def _own(config_class: Any, options: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in own_fields(config_class)}
    return {name: value for name, value in options.items() if name in names}

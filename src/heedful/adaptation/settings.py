"""Everything an adaptation can be told."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from heedful.attention.config import option
from heedful.data.reading import TEXT_COLUMN
from heedful.files import write_json
from heedful.training.trainer_options import trainer_options

SETTINGS = "adapt.json"
"""The file that holds them."""


@dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """How a converted model learns whom to forget."""

    data: str = option("austen", "text to learn from: a file, a folder or a table, as for heedful train")
    val_data: str | None = option(
        None, "validation text, likewise; if left out, the validation split of the data or its last tenth"
    )
    text_column: str = option(TEXT_COLUMN, "column that holds the texts, where the data is a table")
    target_held: float = option(
        0.25, "share of --context that each layer is to hold; becomes the model's default budget"
    )
    context: int | None = option(None, "tokens in a row; if left out 2048, or what the model can read")
    kv_grace: int = option(16, "newest tokens that never go")
    kv_first: int = option(4, "first tokens that never go")
    local_tokens: int | None = option(
        None,
        "tokens of the first stage, forward only: selectors learn layer by layer; by model size if left out",
    )
    lora: int = option(
        0,
        "rank of LoRA on the attention projections, which a second stage trains against the model as it was",
    )
    distill_tokens: int | None = option(None, "tokens of the second stage; by model size if left out")
    batch_size: int = option(1, "rows in a step")
    lr: float = option(2e-3, "peak learning rate of the first stage")
    lora_lr: float = option(5e-4, "peak learning rate of the second stage")
    precision: Literal["fp32", "bf16"] | None = option(
        None, "fp32, or bf16 for weights and autocast; if left out bf16 on a GPU that has it"
    )
    seed: int = option(0, "seed of the start and of the data order")
    checkpoints: int = option(5, "times each stage saves a checkpoint, and measures, evenly spread")
    trainer: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "fields of transformers' TrainingArguments"}
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "checkpoints", "kv_grace", "kv_first"):
            _whole(name, getattr(self, name), 1)
        for name in ("lora", "local_tokens", "distill_tokens"):
            _whole(name, getattr(self, name), 0)
        if self.context is not None and self.context < LEAST_CONTEXT:
            raise ValueError(f"--context must be {LEAST_CONTEXT} or more, got {self.context}")
        if not 0 < self.target_held < 1:
            raise ValueError(f"--target-held must be greater than 0 and less than 1, got {self.target_held}")
        for name in ("lr", "lora_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{_flag(name)} must be greater than 0 and finite, got {getattr(self, name)}"
                )
        if self.data.startswith("synthetic"):
            raise ValueError(
                f"--data {self.data}: a language model learns from text; name a file or a folder"
            )
        object.__setattr__(self, "trainer", trainer_options(self.trainer))

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> "AdaptSettings":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            missing = {f.name for f in dataclasses.fields(cls)} - set(values)
            if missing:
                raise TypeError(f"no {', '.join(sorted(missing))}")
            return cls(**values)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete its folder and adapt again") from None


LEAST_CONTEXT = 128
"""Tokens in a row below which there is nobody to forget."""


def _whole(name: str, value: Any, least: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{_flag(name)} must be a whole number, {least} or more, got {value!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

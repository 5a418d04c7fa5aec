"""Everything a training run can be told, and what it resolves to."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from heedful.attention.config import inherit, option
from heedful.data.reading import TEXT_COLUMN
from heedful.data.tasks import TASKS, task_of
from heedful.decoder import DecoderConfig
from heedful.files import write_json
from heedful.ops.checks import check_most
from heedful.training.trainer_options import trainer_options

if TYPE_CHECKING:
    from heedful.hf.configuration import HeedfulConfig

SETTINGS = "train.json"
"""The file of a run that holds them."""
MOST = 2**31
"""Steps, rows, tokens: what a run may count."""
_NEWER = frozenset({"dropout", "text_column", "trainer", "task_options", "head_dim", "block"})
"""Settings that came when there were folders already: those have them not, and had their defaults."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The size and the form of the model: what a run can say of a `DecoderConfig`."""

    attention: str = inherit(DecoderConfig, "attention", help="attention form (heedful ls)")
    score: str = inherit(DecoderConfig, "score", help="score form (heedful ls)")
    attention_options: dict[str, Any] = inherit(
        DecoderConfig, "attention_options", help="options of the attention form"
    )
    score_options: dict[str, Any] = inherit(DecoderConfig, "score_options", help="options of the score form")
    d_model: int = inherit(DecoderConfig, "d_model", default=128)
    n_layers: int = inherit(DecoderConfig, "n_layers", default=4)
    n_heads: int = inherit(DecoderConfig, "n_heads", default=4)
    n_kv_heads: int | None = inherit(DecoderConfig, "n_kv_heads")
    head_dim: int | None = inherit(DecoderConfig, "head_dim")
    block: Literal["llama", "gpt"] = inherit(DecoderConfig, "block")
    d_ff: int | None = inherit(DecoderConfig, "d_ff")
    positions: Literal["rope", "learned", "none"] = inherit(DecoderConfig, "positions")
    qk_norm: bool | None = inherit(DecoderConfig, "qk_norm")
    init_logit_std: float = inherit(DecoderConfig, "init_logit_std")
    dropout: float = inherit(DecoderConfig, "dropout")

    def to_config(self, vocab_size: int, context: int, bos_token_id: int | None = None) -> "HeedfulConfig":
        """The config of the model, for a vocabulary and a context."""
        from heedful.hf.configuration import HeedfulConfig  # everything else here needs torch only

        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), bos_token_id)
        decoder = self.to_decoder_config(vocab_size, context)
        return HeedfulConfig.from_decoder_config(decoder, **special)

    def to_decoder_config(self, vocab_size: int, context: int) -> DecoderConfig:
        """The same in the decoder's terms.

        Raises:
            ValueError: for sizes that do not fit, or an unknown form or option.
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(ModelSettings)}
        options = {name: dict(own[name]) for name in ("attention_options", "score_options")}
        return DecoderConfig(
            **{**own, **options},
            vocab_size=vocab_size,
            max_positions=max(context, DecoderConfig.max_positions),
        )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ModelSettings):
    """One training run."""

    data: str = option(
        "austen",
        "a .txt, .md, .jsonl, .json, .csv, .tsv or .parquet file, a folder of such, a folder saved by datasets, "
        "austen, or a task: " + ", ".join(f"synthetic:{name}" for name in TASKS),
    )
    task_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "options of the synthetic task"}
    )
    val_data: str | None = option(
        None, "validation text, likewise; if left out, the validation split of the data or its last tenth"
    )
    text_column: str = option(TEXT_COLUMN, "column that holds the texts, where the data is a table")
    tokenizer: Literal["bpe", "chars", "bytes"] = option(
        "bpe", "bpe (trained on the training text), chars (of the training text) or bytes"
    )
    vocab_size: int = option(2048, "size of the BPE vocabulary")
    context: int = option(256, "tokens in a row")
    steps: int = option(500, "optimizer steps")
    batch_size: int = option(16, "rows in a step")
    lr: float = option(2e-3, "peak learning rate; warm-up, then cosine to a tenth")
    warmup: float = option(0.05, "part of the steps that warms up")
    weight_decay: float = option(0.1, "weight decay, on matrices only")
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32, or bf16 autocast")
    seed: int = option(0, "seed of the weights and of the data order")
    evaluations: int = option(5, "times the validation loss is measured, evenly spread")
    checkpoints: int = option(5, "times a checkpoint is saved, evenly spread")
    track: Literal["none", "tensorboard"] = option("none", "where to log curves")
    trainer: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "fields of transformers' TrainingArguments, handed through"}
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "vocab_size", "evaluations", "checkpoints"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{_flag(name)} must be 1 or more, got {value}")
            check_most(_flag(name), value, MOST)
        if self.context < 2:
            raise ValueError(f"--context must be 2 or more, got {self.context}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be greater than 0 and finite, got {self.lr}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup must be at least 0 and below 1, got {self.warmup}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight-decay must be 0 or more and finite, got {self.weight_decay}")
        object.__setattr__(self, "trainer", trainer_options(self.trainer))
        task = task_of(self.data, self.task_options)
        if task is not None:
            fitting, asked = task.fit(self.context), self.task_options.get(task.grows)
            if asked is not None and fitting != task:
                room, name = getattr(fitting, task.grows), f"--task.{task.grows.replace('_', '-')}"
                raise ValueError(
                    f"{name} {asked} takes rows of {task.length:,} tokens, and --context is {self.context}: at "
                    f"most {room} fit; give fewer, or a longer context"
                )
        # Any vocabulary will do to see whether the form and its options are sound.
        self.to_decoder_config(self.vocab_size, self.context)

    @property
    def warmup_steps(self) -> int:
        """Steps that warm up."""
        return round(self.warmup * self.steps)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> "TrainSettings":
        """Read what `save` wrote; a setting that is newer than the file had its default.

        Raises:
            ValueError: if the file is damaged, or lacks what every version wrote.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if missing := missing_settings(values):
                raise TypeError(f"no {', '.join(missing)}")
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); start again with another --out") from None


def missing_settings(values: Any) -> list[str]:
    """What every version has written of a `TrainSettings` and is not there.

    Raises:
        TypeError: if these are no settings at all.
    """
    if not isinstance(values, dict):
        raise TypeError(f"expected settings by name, got {type(values).__name__}")
    return [f.name for f in dataclasses.fields(TrainSettings) if f.name not in _NEWER | set(values)]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

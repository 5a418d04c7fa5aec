"""What a finished run leaves behind."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful.files import write_json


@dataclass(frozen=True)
class RunResult:
    """The figures of one run; `result.json` in its folder."""

    attention: str
    score: str
    seed: int
    lr: float
    params: int
    flops_per_token: int
    """Forward FLOPs per token at the run's context; training costs three times it."""
    tokens: int
    """Tokens trained on."""
    val_loss: float
    """Nats per token."""
    val_bpb: float | None
    """Bits per byte; None for synthetic data."""
    val_accuracy: float
    seconds_per_step: float
    tokens_per_second: float
    cache_bytes_per_token: int
    """Bytes of KV cache per token, all layers, in fp32."""
    curve: list[tuple[int, float, float]]
    """(tokens trained on, loss, accuracy) on some 64 rows of the validation data, while training."""
    config: dict[str, Any]
    """The settings of the run and the config of the model."""
    accuracy_at: dict[str, float] | None = None
    """Right answers to a synthetic task at "1", "2" and "4" times the length of training; None for text."""
    data_digest: str | None = None
    """`Data.digest` of what it was trained and measured on; None: of before there was one."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> "RunResult":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**fields, "curve": [tuple(point) for point in fields["curve"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and resume, or train again") from None

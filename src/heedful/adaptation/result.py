"""What an adaptation leaves behind."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful.files import write_json


@dataclass(frozen=True)
class AdaptResult:
    """The figures of an adaptation; `adapt/result.json` in the folder of the model."""

    kl_before: float
    """KL to the source with every token, nats per token, under the budget where the oldest goes, on validation
    rows."""
    kl_after_local: float
    """The same after the first stage."""
    kl: float
    """The same at the end."""
    held: int
    """Tokens that each layer holds, those that never go included."""
    context: int
    """Tokens in a row."""
    validation_rows: int
    local_tokens: int
    """Read in the first stage."""
    distill_tokens: int
    """Read in the second stage; 0: there was none."""
    trained_parameters: int
    """Of selectors, and of adapters, which are merged at the end."""
    policy: str
    """Who goes: "selective", or "streaming" where nobody votes."""
    seconds: float
    """Of this call; after a resumption of the last one."""
    settings: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "AdaptResult":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error})") from None

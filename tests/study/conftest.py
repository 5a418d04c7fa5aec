"""A study of a few steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import heedful  # noqa: F401 - a fixture

from heedful.study import Study, load_study

TINY = {
    "title": "Votes",
    "claim": "votes help",
    "source": "nobody",
    "metric": "loss",
    "effect": 0.1,
    "spread": 0.1,
    "seeds": 2,
    "rates": [1e-3, 1e-2],
    "train": {"d_model": 16, "n_layers": 1, "n_heads": 2, "context": 32, "batch_size": 4, "steps": 4},
    "arms": {"mha": {}, "selective": {"score": "selective"}},
    "contrasts": [{"arm": "selective", "against": "mha", "claims": "lower", "says": "votes help"}],
}


def toml(value: Any) -> str:
    """Inline TOML; JSON but for tables and what may be missing."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


@pytest.fixture
def written(text_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """The file of a study; a value of None leaves a key out."""

    def write(**changed: Any) -> Path:
        whole = {k: v for k, v in {**TINY, **changed}.items() if v is not None}
        small = {"data": str(text_file), "tokenizer": "bytes", "evaluations": 2, "checkpoints": 1}
        whole["train"] = {**small, **whole["train"]}
        path = tmp_path / "studies" / "votes.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{k} = {toml(v)}\n" for k, v in whole.items()))
        return path

    return write


@pytest.fixture
def study(written: Callable[..., Path]) -> Callable[..., Study]:
    """The study itself."""
    return lambda **changed: load_study(str(written(**changed)))

"""Small models with tokenizers: one trained, one stock, and that one converted, whose votes matter."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.stock import save_stock_model

from heedful.hf.load import load_model

TEXTS = [
    "the cat sat on a mat and saw a dog run",
    "a dog sat",
    "on the mat the cat and the dog saw a run of cats",
]


@pytest.fixture(scope="session")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selective model, trained on bytes."""
    from heedful.training import TrainSettings, train

    sizes: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 2, "context": 48}
    settings = TrainSettings(
        data=str(text_file), tokenizer="bytes", score="selective", **sizes, steps=30, batch_size=8, lr=1e-2
    )
    out = tmp_path_factory.mktemp("lm-eval") / "trained"
    train(settings, out, console=Console(file=io.StringIO()))
    return out


@pytest.fixture(scope="session")
def stock(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock llama with weights large enough for everything to matter."""
    return save_stock_model(tmp_path_factory.mktemp("lm-eval") / "stock", [text_file.read_text()], std=0.2)


@pytest.fixture(scope="session")
def converted(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted."""
    import heedful

    folder = tmp_path_factory.mktemp("lm-eval") / "converted"
    heedful.convert(stock, folder)
    return folder


@pytest.fixture(scope="session")
def voting(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with votes that differ."""
    model = load_model(converted)
    torch.manual_seed(1)
    for score in model.scores:
        for parameter in score.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("lm-eval") / "voting"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((converted / name).read_bytes())
    return folder


@pytest.fixture
def ask() -> Callable[..., list[Any]]:
    """Requests as the harness makes them."""
    from lm_eval.api.instance import Instance

    def make(kind: Any, *arguments: tuple[Any, ...]) -> list[Any]:
        return [
            Instance(request_type=kind, doc={}, arguments=given, idx=n) for n, given in enumerate(arguments)
        ]

    return make

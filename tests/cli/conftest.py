"""The command line in process."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.cli import main


@dataclass(frozen=True)
class Done:
    """What a command left on the screen."""

    code: int
    out: str
    err: str

    def error(self, code: int) -> str:
        """The one line that says what went wrong."""
        assert self.code == code, (self.code, self.out, self.err)
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("heedful"), lines[0]
        assert not re.match(r"heedful \w*: \w+Error", lines[0]), lines[0]
        return lines[0]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wide screen, no settings of the person who tests, no forms left behind."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HEEDFUL_FORMS", "")
    monkeypatch.delenv("HEEDFUL_TRACEBACK", raising=False)
    before = [(registry, dict(registry.forms)) for registry in (ATTENTIONS, SCORES)]
    yield
    os.environ.pop("HEEDFUL_FORMS", None)
    for registry, forms in before:
        registry.forms.clear()
        registry.forms.update(forms)
    for name in [name for name in sys.modules if name.startswith("heedful_forms_")]:
        del sys.modules[name]


@pytest.fixture
def heedful(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command; everything that reaches the screen is captured, whoever writes it."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stopped:
            assert isinstance(stopped.code, int)
            code = stopped.code
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Done(code, out, err)

    return run


@pytest.fixture
def small(text_file: Path) -> list[str]:
    """Flags of a run that takes a fraction of a second."""
    flags = {
        "--data": text_file,
        "--tokenizer": "bytes",
        "--d-model": 16,
        "--n-layers": 1,
        "--n-heads": 2,
        "--context": 32,
        "--batch-size": 4,
        "--steps": 4,
    }
    return [str(word) for pair in flags.items() for word in pair]


@pytest.fixture(scope="session")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small trained model."""
    import io

    from rich.console import Console

    from heedful.training import TrainSettings, train

    settings = TrainSettings(
        data=str(text_file),
        tokenizer="bytes",
        d_model=32,
        n_layers=1,
        n_heads=2,
        context=32,
        steps=40,
        lr=1e-2,
    )
    out = tmp_path_factory.mktemp("trained") / "run"
    train(settings, out, console=Console(file=io.StringIO()))
    return out


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, to see that nothing was touched."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    return read

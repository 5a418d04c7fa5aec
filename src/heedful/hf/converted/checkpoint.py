"""Checkpoints as files: what a folder holds, checked before anything is written; weights stream through."""

import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
CONFIG = "config.json"
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".npz",
    ".pkl",
)
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows


@dataclass(frozen=True)
class Checkpoint:
    """A folder of config.json and safetensors."""

    folder: Path
    config: dict[str, Any]
    files: tuple[str, ...]
    """The files of weights, in order."""
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor."""
    dtypes: dict[str, str]
    """As safetensors writes them, such as "BF16"."""
    home: dict[str, str]
    """The file of every tensor."""

    @classmethod
    def read(cls, folder: str | Path) -> "Checkpoint":
        """What is in `folder`; only headers of weights are read.

        Raises:
            FileNotFoundError: if there is no such folder, config or weights.
            ValueError: for weights that are pickled or damaged, or an index that does not fit.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder; expected one with config.json and safetensors"
            )
        config = read_json(folder / CONFIG, "the config of a model")
        files = _files_of(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        home: dict[str, str] = {}
        for name in files:
            for tensor, facts in _header(folder / name).items():
                if tensor in home:
                    raise ValueError(f"tensor {tensor} is in {home[tensor]} and in {name}; expected it once")
                shapes[tensor], dtypes[tensor], home[tensor] = tuple(facts["shape"]), facts["dtype"], name
        return cls(folder, config, files, shapes, dtypes, home)

    def parameters(self, within: str = "") -> int:
        """The numbers in all tensors with `within` in their names."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if within in name)

    def others(self) -> list[Path]:
        """Files that go along as they are: tokenizer, chat template, generation config, cards and licences."""
        return [path for path, why in self._beside() if not why]

    def left_behind(self) -> list[str]:
        """Files that do not go along, each with the reason."""
        return [f"{path.name} ({why})" for path, why in self._beside() if why]

    def _beside(self) -> Iterator[tuple[Path, str]]:
        """The files beside config and weights, and why one stays behind."""
        for path in sorted(self.folder.iterdir()):
            name = path.name.lower()
            own = path.name in (CONFIG, INDEX) or name.endswith((*_WEIGHTS, ".index.json"))
            if not path.is_file() or own or name.startswith("."):
                continue
            known = name.endswith((".json", ".txt", ".md", ".model", ".jinja", ".tiktoken"))
            if name.endswith(".py"):
                yield path, "code is never copied"
            elif not known and not name.startswith(("license", "licence", "notice", "copying")):
                yield path, "what it is for is not known"
            elif not self._inside(path):
                yield path, "it points out of the folder"
            else:
                yield path, ""

    def _inside(self, path: Path) -> bool:
        """Whether a file is in the folder; or, of a snapshot in a hub's cache, among the blobs of its model."""
        real, folder = path.resolve(), self.folder.resolve()
        blobs = folder.parent.parent / "blobs"
        return folder in real.parents or (folder.parent.name == "snapshots" and real.parent == blobs)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """An object in a file.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is no JSON, or another value than an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, {what}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object, got {type(value).__name__}")
    return value


def _files_of(folder: Path) -> tuple[str, ...]:
    if (folder / ONE).is_file():
        return (ONE,)
    if not (folder / INDEX).exists():
        pickled = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        )
        if pickled:
            raise ValueError(
                f"{folder} holds pickled weights ({', '.join(pickled[:3])}), which may run any code when they are "
                f"read; expected safetensors: save the model again with save_pretrained in a place you trust"
            )
        raise FileNotFoundError(f"{folder} has no weights: neither {ONE} nor {INDEX}")
    weight_map = read_json(folder / INDEX, "the index of weights").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / INDEX} must have a weight_map from tensors to files")
    names = tuple(dict.fromkeys(weight_map.values()))
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors") or name in (".", ".."):
            raise ValueError(
                f"{folder / INDEX} names the file {name!r}; expected plain names of .safetensors files beside it"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / INDEX} names {name}, which is not in the folder")
        if (folder / name).is_symlink() and not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} points nowhere")
    return names


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape and data_offsets of every tensor; the file must be as long as they say."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_LARGEST_HEADER, size - 8):
                raise ValueError(f"its header would take {length:,} of {size:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((facts["data_offsets"][1] for facts in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end:,} bytes and has {size:,}")
        with safe_open(path, framework="pt") as whole:  # its own checks: offsets, shapes, dtypes
            whole.keys()
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        struct.error,
        SafetensorError,
    ) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    return header


def tensors(path: Path, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Some tensors of a file, one after the other."""
    with safe_open(path, framework="pt") as file:
        for name in names:
            yield name, file.get_tensor(name)


def copy(source: Path, target: Path) -> None:
    """A file, its bytes alone: permissions and links stay behind."""
    shutil.copyfile(source, target)

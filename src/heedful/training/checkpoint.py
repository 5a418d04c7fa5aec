"""Checkpoints on the disk: which one is the newest that is whole, and whether it is what was written."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

from heedful.files import write_json

CHECKPOINT_PARTS = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state*.pth",
    "trainer_state.json",
)
CHECKSUMS = "checksums.json"
_CHUNK = 1 << 22


def last_checkpoint(place: Path, parts: Sequence[str] = CHECKPOINT_PARTS) -> str | None:
    """The newest checkpoint that was written to its end; Trainer would go on without what is missing."""
    steps = {p: p.name.partition("-")[2] for p in place.glob("checkpoint-*")}
    folders = [p for p, step in steps.items() if step.isascii() and step.isdecimal()]
    for folder in sorted(folders, key=lambda p: int(steps[p]), reverse=True):
        if all(any(path.is_file() for path in folder.glob(part)) for part in parts):
            return str(folder)
    return None


def write_checksums(folder: Path) -> None:
    """Note what is in the files of a checkpoint, beside them."""
    sums = {path.name: _checksum(path) for path in sorted(folder.iterdir()) if _is_part(path)}
    write_json(folder / CHECKSUMS, sums)


def check_checksums(folder: Path) -> None:
    """Raise for a file that is not what was written; checkpoints of early versions have no checksums.

    Raises:
        ValueError: naming the file.
    """
    if not (folder / CHECKSUMS).exists():
        return
    sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    if not isinstance(sums, dict):
        raise ValueError(f"{CHECKSUMS} must hold an object, got {type(sums).__name__}")
    for name, expected in sums.items():
        path = folder / name
        if _is_part(path) and (found := _checksum(path)) != expected:
            raise ValueError(f"{name} is not what was written: its checksum is {found}, expected {expected}")


def _is_part(path: Path) -> bool:
    """Whether it is the first process's; others write their random states whenever they come to it."""
    return path.is_file() and path.name != CHECKSUMS and not path.name.startswith("rng_state_")


def _checksum(path: Path) -> str:
    """Of the bytes: against flipped bits, not against anybody's intent."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"

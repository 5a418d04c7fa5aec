"""Damaged files: every command that reads them works, or says in one line which file it was, and writes nothing."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.adversary import made
from tests.adversary.attack import Attack, Broken, Case
from tests.adversary.commands import contents, heedful, warm

COMMANDS: dict[str, list[list[str]]] = {
    "trained": [
        ["generate", "run", "the cat", "--max-new-tokens", "8"],
        ["eval", "run", "--rows", "2", "--kv-budget", "8", "--out", "new"],
        ["doctor", "run", "--kv-budget", "6"],
        ["train", "--resume", "--out", "run"],
    ],
    "converted": [
        ["generate", "run", "the cat", "--max-new-tokens", "8"],
        [
            "eval",
            "run",
            "--data",
            "words.txt",
            "--context",
            "32",
            "--rows",
            "2",
            "--kv-budget",
            "8",
            "--out",
            "new",
        ],
        ["doctor", "run"],
        ["convert", "run", "new", "--back"],
    ],
    "stock": [["convert", "run", "new"]],
    "compared": [["compare", "--data", "words.txt", *made.TRAIN, *made.COMPARE, "--out", "run"]],
    "stopped": [["train", "--resume", "--out", "run"]],
}
TABLES = {"compare": {"run/results.jsonl", "run/summary.md", "run/compare.png"}}
"""What a command writes though it fails: a comparison leaves what it knows of the other runs."""
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    2**31,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    [None],
    {},
    {"a": 1},
]


def start(folder: Path) -> Case:
    warm()
    made.text(folder)
    for kind in COMMANDS:
        getattr(made, kind)(folder)
    whole = folder / "whole"
    shutil.copytree(folder / "stopped", whole / "run")
    made.text(whole)
    done = heedful(["train", "--resume", "--out", "run"], whole)
    assert done.code == 0, done.err
    result = result_of(whole / "run")

    def case(draw: random.Random, place: Path) -> str:
        return damaged(draw, place, folder, result)

    return case


def damaged(draw: random.Random, place: Path, folder: Path, result: dict[str, Any]) -> str:
    """One file of a folder, damaged in one way, and one command that reads it."""
    kind = draw.choice(list(COMMANDS))
    shutil.copytree(folder / kind, place / "run")
    made.text(place)
    rest = (p for p in sorted((place / "run").rglob("*")) if p.suffix not in (".md", ".py", ".png"))
    files = [p for p in rest if p.is_file()]
    file, words = draw.choice(files), draw.choice(COMMANDS[kind])
    how, damage = draw.choice(list(DAMAGES.items()))
    said = damage(draw, file)
    before = contents(place)
    done = heedful(words, place, limit=40)
    what = f"{kind}/{file.relative_to(place / 'run')} {how} {said}; heedful {' '.join(words)}"
    done.check(what)
    if done.late:
        raise Broken(f"{what}: took longer than {done.seconds:.0f} seconds")
    if done.code:
        after = contents(place)
        left = {n for n in {**before, **after} if before.get(n) != after.get(n)} - TABLES.get(words[0], set())
        if left:
            raise Broken(f"{what}: failed, and left {sorted(left)}")
        last = done.err.strip().splitlines()[-1]
        if file.name not in last and not re.search(r"\brun\b", last.replace("--out run", "")):
            raise Broken(f"{what}: does not name the file: {last}")
        return f"{kind} {how}: refused"
    if kind == "stopped" and "checkpoint" in str(file) and result_of(place / "run") != result:
        raise Broken(f"{what}: went on, to another result")
    return f"{kind} {how}: works"


def result_of(run: Path) -> dict[str, Any]:
    """The figures of a run, and its weights."""
    figures = json.loads((run / "result.json").read_text(encoding="utf-8"))
    timing = ("seconds_per_step", "tokens_per_second")
    return {n: x for n, x in figures.items() if n not in timing} | {
        "w": (run / "model.safetensors").read_bytes()
    }


def truncated(draw: random.Random, file: Path) -> str:
    size = draw.randrange(max(file.stat().st_size, 1))
    os.truncate(file, size)
    return f"to {size} bytes"


def empty(draw: random.Random, file: Path) -> str:
    file.write_bytes(b"")
    return ""


def flipped(draw: random.Random, file: Path) -> str:
    content = bytearray(file.read_bytes())
    bits = [draw.randrange(8 * len(content)) for _ in range(draw.choice([1, 1, 8])) if content]
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bits {bits}"


def garbage(draw: random.Random, file: Path) -> str:
    kind = draw.choice(
        [b"\x00\xff" * 50, b"[]", b"null", b"{}", b"3", b'"x"', b"{", b"[" * 5000, b"\xef\xbb\xbf{}", b"NaN"]
    )
    file.write_bytes(kind)
    return repr(kind[:20])


def folder(draw: random.Random, file: Path) -> str:
    file.unlink()
    file.mkdir()
    return "instead of a file"


def missing(draw: random.Random, file: Path) -> str:
    file.unlink()
    return ""


def changed(draw: random.Random, file: Path) -> str:
    """One value of a JSON file, or a key that is foreign or gone; of another file the numbers of its header."""
    if file.suffix != ".json":
        return flipped(draw, file)
    value = json.loads(file.read_text(encoding="utf-8"))
    places = list(walk(value))
    if not places:
        return empty(draw, file)
    holder, key = draw.choice(places)
    odd = draw.choice(ODD)
    what = draw.choice(["set", "set", "set", "lost", "foreign"])
    if what == "set":
        holder[key] = odd
    elif what == "lost":
        del holder[key]
    elif isinstance(holder, dict):
        key = draw.choice(["x", "", "__class__", "auto_map", "attention", "é"])
        holder[key] = odd
    file.write_text(json.dumps(value), encoding="utf-8")
    return f"{what} {key!r}: {odd!r}"


def walk(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value; of a long list or table the first ones."""
    found = []
    entries = list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    )
    for key, inner in entries[:40]:
        found += [(value, key), *walk(inner)]
    return found


DAMAGES: dict[str, Callable[[random.Random, Path], str]] = {
    f.__name__: f for f in (truncated, empty, flipped, flipped, garbage, folder, missing, changed)
} | {"changed again": changed, "changed once more": changed}

ATTACK = Attack(
    "files",
    "damaged files of models, runs and checkpoints; `generate`, `eval`, `doctor`, `convert`, `compare`, "
    "`train --resume`",
    0.2,
    start,
    limit=90.0,
)

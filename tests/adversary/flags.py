"""Odd flags of every command: it works or says in one line why not, soon, and in little memory."""

import random
import re
import shutil
from pathlib import Path

from tests.adversary import made
from tests.adversary.attack import Attack, Broken, Case
from tests.adversary.commands import heedful, warm

LIMIT, BRIEF = 15.0, 4.0
"""Seconds, and those for what is slow in any case; what was asked for much may take longer, and is then ended."""
TRAIN = ["--data", "words.txt", *made.TRAIN, "--steps", "3"]
COMMANDS: dict[str, list[str]] = {
    "train": [*TRAIN, "--out", "new"],
    "compare": [*TRAIN, "--attention", "mha", "--score", "softmax", "--seeds", "1", "--out", "new"],
    "study": ["small.toml"],
    "convert": ["stock", "new"],
    "adapt": ["converted", "--data", "words.txt", "--context", "128", "--local-tokens", "256"],
    "generate": ["trained", "the cat", "--max-new-tokens", "4"],
    "serve": ["converted"],
    "eval": ["trained", "--rows", "2", "--kv-budget", "8", "--out", "new"],
    "bench kernels": ["--lengths", "16", "--turns", "1", "--out", "new"],
    "bench train": ["--lengths", "16", "--out", "new"],
    "bench prefill": ["--lengths", "16", "--out", "new"],
    "bench decode": ["--context", "16", "--out", "new"],
    "budget": ["trained", "--rows", "2"],
    "demo": [],
    "ls": [],
    "show": ["mha"],
    "doctor": ["trained"],
}
VALUES = (
    *("", " ", "0", "-1", "1", "2", "1.5", "99999999999999999999", "4294967296", "1e308", "1e-320", "-0.0"),
    *(
        "nan",
        "inf",
        "-inf",
        "１２",
        "٣",
        "½",
        "²",
        "0x10",
        "1_000",
        " 5",
        "5 ",
        "+5",
        "1e3",
        "x" * 5000,
        "é☃\u202e",
    ),
    *(
        "\udce9",
        "/dev/null",
        "/dev/null/x",
        "/dev/zero",
        "/dev/full",
        "/proc/self/mem",
        "missing/a/b",
        ".",
        "..",
    ),
    *(
        "words.txt",
        "trained",
        "a,b",
        ",,,",
        "1,,2",
        "8,8",
        "true",
        "None",
        "[]",
        "{}",
        "-",
        "--",
        "--x",
        "%s%n",
    ),
    *(
        "full",
        "\n",
        "synthetic:mqar",
        "synthetic:",
        "selective",
        "mha",
        "sas",
        "softmax,softmax",
        "cuda",
        "auto",
    ),
)
MUCH = ("99999999999999999999", "4294967296", "1_000", "1e3", "1e308", "synthetic:mqar")
"""Values that may ask for more work than there is time for."""
SLOW = ("demo", "bench", "budget", "study")
"""Commands that may take longer as they are: what is wrong with their words is said at once."""


def start(folder: Path) -> Case:
    warm()
    place = folder / "whole"
    place.mkdir()
    made.trained(place)
    made.converted(place)
    made.study(place)
    flags = {command: flags_of(command, folder) for command in COMMANDS}

    def case(draw: random.Random, inner: Path) -> str:
        return odd(draw, inner, place, flags)

    return case


def flags_of(command: str, folder: Path) -> list[str]:
    """What its help names."""
    done = heedful([*command.split(), "--help"], folder)
    assert done.code == 0, done.err
    return sorted(set(re.findall(r"--[a-z][a-z0-9.-]*[a-z0-9]", done.out)) - {"--help"})


def odd(draw: random.Random, inner: Path, place: Path, flags: dict[str, list[str]]) -> str:
    """A command line that would be right, but for one to three words."""
    here = inner / "here"
    shutil.copytree(place, here)
    command = draw.choice(list(COMMANDS))
    words = list(COMMANDS[command])
    for _ in range(draw.choice([1, 1, 2, 3])):
        words = change(draw, words, flags[command])
    what = f"heedful {command} " + " ".join(map(ascii, (w[:40] for w in words)))
    slow = command.split()[0] in SLOW
    done = heedful([*command.split(), *words], here, limit=BRIEF if slow else LIMIT)
    done.check(what)
    if done.late:
        if slow or any(much in word for much in MUCH for word in words):
            return f"{command}: long"
        raise Broken(f"{what}: took longer than {LIMIT:g} seconds")
    return f"{command}: code {done.code}"


def change(draw: random.Random, words: list[str], flags: list[str]) -> list[str]:
    """A flag with an odd value, twice or without one; or an odd word where there was another."""
    how = draw.choice(["value", "value", "value", "equals", "bare", "twice", "replace", "lose", "unknown"])
    value, flag = draw.choice(VALUES), draw.choice(flags or ["--out"])
    if how == "value":
        return [*words, flag, value]
    if how == "equals":
        return [*words, f"{flag}={value}"]
    if how == "bare":
        return [*words, flag]
    if how == "twice":
        return [*words, flag, draw.choice(VALUES), flag, value]
    if how == "replace" and words:
        at = draw.randrange(len(words))
        return [*words[:at], value, *words[at + 1 :]]
    if how == "lose" and words:
        at = draw.randrange(len(words))
        return words[:at] + words[at + 1 :]
    return [*words, draw.choice(["--xyzzy", "-z", "--", "--no-" + flag[2:], value])]


ATTACK = Attack(
    "flags",
    "odd flags and values of every command: codes, one line, time, memory below 2 GB",
    0.25,
    start,
    limit=60.0,
)

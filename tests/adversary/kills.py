"""kill -9 at a random moment of each command that writes: afterwards it ends, with the result of a whole run."""

import csv
import functools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.adversary import made
from tests.adversary.attack import Attack, Broken, Case
from tests.adversary.commands import Done, heedful, warm

Words = list[str]
TIMING = ("second", "tokens_per", "tokens/s", "time", "version", "commit")
"""Parts of the names of figures that no two runs share."""
UNLIKE = ("log.jsonl", "times.json", "README.md", "modeling_heedful.py")
"""Files that say how a run went: a log goes on where the last checkpoint was, and may say a step twice."""


@dataclass(frozen=True)
class Target:
    """A command that writes, in a folder where all that it reads lies."""

    words: Words
    again: Callable[[Path], Words]
    """What to say after a kill."""
    out: str
    """The folder it writes."""
    loads: str | None = None
    """A model that must be whole wherever it can be read, at any moment."""


def _train(place: Path) -> Words:
    begun = (place / "new" / "train.json").exists()
    return ["train", "--resume", "--out", "new"] if begun else TARGETS["train"].words


def _adapt(place: Path) -> Words:
    begun = (place / "converted" / "adapt" / "adapt.json").exists()
    return ["adapt", "converted", "--resume"] if begun else TARGETS["adapt"].words


def _same(name: str, *more: str) -> Callable[[Path], Words]:
    return lambda place: [*TARGETS[name].words, *more]


SMALL = ["--data", "words.txt", *made.TRAIN, "--steps", "12"]
TARGETS = {
    "train": Target(["train", *SMALL, "--checkpoints", "4", "--out", "new"], _train, "new", "new"),
    "compare": Target(
        [
            "compare",
            *SMALL,
            "--attention",
            "mha",
            "--score",
            "softmax,selective",
            "--seeds",
            "1",
            "--out",
            "new",
        ],
        _same("compare"),
        "new",
    ),
    "study": Target(["study", "small.toml", "--out", "new", "--models", "runs"], _same("study"), "new"),
    "convert": Target(
        ["convert", "stock", "new", "--kv-budget", "8"], _same("convert", "--force"), "new", "new"
    ),
    "adapt": Target(
        [
            "adapt",
            "converted",
            "--data",
            "words.txt",
            "--context",
            "128",
            "--kv-grace",
            "4",
            "--local-tokens",
            "512",
        ],
        _adapt,
        "converted",
        "converted",
    ),
    "eval": Target(
        ["eval", "trained", "--rows", "2", "--kv-budget", "8,16", "--out", "new"], _same("eval"), "new"
    ),
}


def start(folder: Path) -> Case:
    warm()
    place = folder / "whole"
    place.mkdir()
    made.trained(place)
    made.converted(place)
    made.study(place)

    @functools.cache
    def in_peace(name: str) -> tuple[Done, dict[str, Any], set[str]]:
        """How it went, figures, and what the model says before and after."""
        there = folder / f"peace-{name}"
        shutil.copytree(place, there)
        target = TARGETS[name]
        before = says(there, target)
        done = heedful(target.words, there, limit=120)
        expect(done, target.words)
        return done, figures(there / target.out), {before, says(there, target)}

    def case(draw: random.Random, inner: Path) -> str:
        name = draw.choice(list(TARGETS))
        return killed(draw, inner / "here", place, TARGETS[name], name, *in_peace(name))

    return case


def killed(
    draw: random.Random,
    here: Path,
    place: Path,
    target: Target,
    name: str,
    peace: Done,
    expected: dict[str, Any],
    models: set[str],
) -> str:
    """One or two kills, and then the end."""
    shutil.copytree(place, here)
    words, kills = target.words, []
    for _ in range(draw.choice([1, 1, 2])):
        if draw.random() < 0.5:
            moment = draw.uniform(0, 1.05 * peace.seconds)
            kills.append(f"after {moment:.3f} of {peace.seconds:.2f} seconds")
            heedful(words, here, kill_after=moment)
        else:
            change = draw.randint(1, peace.changes)
            kills.append(f"before change {change} of {peace.changes}")
            heedful(words, here, kill_at=change)
        what = f"{name}, killed {' and '.join(kills)}"
        if (said := says(here, target)) not in {"", *models}:
            raise Broken(f"{what}: half a model was read as a whole one, and said {said!r}")
        words = target.again(here)
    done = heedful(words, here, limit=120)
    expect(done, words, what)
    found = figures(here / target.out)
    if apart := sorted(n for n in {**expected, **found} if expected.get(n) != found.get(n)):
        raise Broken(
            f"{what}: not as in peace: {[(n, expected.get(n), found.get(n)) for n in apart][:3]}"[:600]
        )
    return name


def expect(done: Done, words: Words, what: str = "in peace") -> None:
    if done.code:
        raise Broken(f"{what}: heedful {' '.join(words)}: code {done.code}: {(done.out + done.err)[-400:]}")


def says(place: Path, target: Target) -> str:
    """What the model that a command writes generates; "" where it cannot be read, which is said in one line."""
    if target.loads is None:
        return ""
    done = heedful(
        ["generate", target.loads, "the cat", "--max-new-tokens", "8", "--kv-budget", "full"], place
    )
    done.check("generate, after a kill")
    return done.out if done.code == 0 else ""


def figures(folder: Path) -> dict[str, Any]:
    """What a command promises to find again: weights, figures and tables, but for times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name.endswith(UNLIKE) or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            found[name] = hash(path.read_bytes())
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            rows = path.read_text(encoding="utf-8").splitlines()
            found[name] = sorted(json.dumps(timeless(json.loads(row)), sort_keys=True) for row in rows)
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8") as file:
                found[name] = [timeless(row) for row in csv.DictReader(file)]
    return found


def timeless(value: Any) -> Any:
    """Without what no two runs share."""
    if isinstance(value, dict):
        return {n: timeless(x) for n, x in value.items() if not any(part in n for part in TIMING)}
    return [timeless(x) for x in value] if isinstance(value, list) else value


ATTACK = Attack(
    "kills",
    "kill -9 of `train`, `compare`, `study`, `convert`, `adapt`, `eval`: at random moments, or before a random "
    "change on the disk; then the same command or `--resume`",
    0.25,
    start,
    limit=200.0,
)

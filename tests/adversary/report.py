"""The page and the raw data of a run."""

import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.adversary.attack import Attack, Outcome

from heedful.files import write_text
from heedful.machine import cpu_name

PAGE = """# Attacks on heedful

What `make adversary` tried, and what broke. Cases are random, but the same for the same seed; how many there are
depends on the machine and its load.

| attack | cases | failures | seconds | what it covers |
|---|---:|---:|---:|---|
{rows}

Seed {seed}, commit {commit}, {cpu}. Repeat it with

    python -m tests.adversary --minutes {minutes:g} --seed {seed} --out results/adversary

and a single case with `--only NAME --case NUMBER`. `cases.jsonl` counts the kinds of cases, attack by attack, and
holds every failure with its number.
"""


def write(
    out: Path, attacks: Sequence[Attack], outcomes: Sequence[Outcome], seed: int, minutes: float
) -> None:
    """README.md and cases.jsonl."""
    of = {attack.name: [o for o in outcomes if o.attack == attack.name] for attack in attacks}
    covers = {attack.name: attack.covers for attack in attacks}
    rows = [
        f"| {name} | {len(tried):,} | {len(failures(tried))} | {seconds(tried):,.0f} | {covers[name]} |"
        for name, tried in of.items()
    ]
    page = PAGE.format(rows="\n".join(rows), seed=seed, commit=commit(), cpu=cpu_name(), minutes=minutes)
    if broken := failures(outcomes):
        page += "\n## Failures\n\n" + "".join(
            f"- {o.attack} {o.case}: {' '.join(str(o.failure).split())}\n" for o in broken
        )
    lines = []
    for attack in attacks:
        kinds = Counter(o.kind for o in of[attack.name] if o.failure is None)
        lines += [{"attack": attack.name, "kind": kind, "cases": n} for kind, n in sorted(kinds.items())]
    lines += [o.to_dict() for o in failures(outcomes)]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "README.md", page)
    write_text(out / "cases.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def failures(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [o for o in outcomes if o.failure is not None]


def seconds(outcomes: Sequence[Outcome]) -> float:
    return sum(o.seconds for o in outcomes)


def commit() -> str:
    """Of the checkout, with a mark where files differ from it."""
    here = Path(__file__).parent
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=here, capture_output=True, text=True
    )
    return said.stdout.strip() or "unknown"

"""Attacks heedful for some minutes, or repeats one case: python -m tests.adversary --help."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)  # before torch is there

from tests.adversary import files, flags, kills, models, operations, report, runner  # noqa: E402
from tests.adversary.attack import Outcome  # noqa: E402

ATTACKS = [module.ATTACK for module in (operations, models, kills, files, flags)]
EVERY = 10.0
"""Seconds between two lines of progress."""


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.adversary", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all attacks together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the page; nothing is written without"
    )
    parser.add_argument("--only", choices=[a.name for a in ATTACKS], help="one attack, with all the time")
    parser.add_argument("--case", type=int, default=None, help="with --only: this case alone")
    given = parser.parse_args(arguments)
    if given.case is not None and given.only is None:
        parser.error("--case belongs to --only")
    attacks = [a for a in ATTACKS if given.only in (None, a.name)]
    total = sum(a.share for a in attacks)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="adversary-") as folder:
        for attack in attacks:
            seconds = 60 * given.minutes * attack.share / total
            first, most = (0, None) if given.case is None else (given.case, 1)
            begun = said = time.monotonic()
            mine: list[Outcome] = []
            for outcome in runner.run(attack, given.seed, seconds, Path(folder), first, most):
                mine.append(outcome)
                if outcome.failure is not None:
                    print(f"{attack.name} {outcome.case}: {outcome.failure}", flush=True)
                elif given.case is not None:
                    print(f"{attack.name} {outcome.case}: {outcome.kind}")
                if time.monotonic() - said > EVERY:
                    said = time.monotonic()
                    print(
                        f"{attack.name}  {said - begun:.0f} of {seconds:.0f} seconds  {len(mine):,} cases",
                        flush=True,
                    )
            broken = len(report.failures(mine))
            print(f"{attack.name}: {len(mine):,} cases, {broken} failures", flush=True)
            outcomes += mine
    if given.out is not None:
        report.write(given.out, attacks, outcomes, given.seed, given.minutes)
        print(f"written: {given.out / 'README.md'}, {given.out / 'cases.jsonl'}")
    return int(bool(report.failures(outcomes)))


if __name__ == "__main__":
    sys.exit(main())

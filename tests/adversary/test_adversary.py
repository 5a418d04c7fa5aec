"""The adversary itself: its attacks run, what they find is recorded and can be repeated, and a crash ends none."""

import itertools
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from tests.adversary import __main__ as entry
from tests.adversary import commands, files, models, operations, runner
from tests.adversary.attack import Attack, Broken, source_of
from tests.adversary.runner import attempt

from heedful.ops.selective import api


@pytest.mark.parametrize("attack", [operations.ATTACK, models.ATTACK], ids=lambda a: a.name)
def test_some_cases_hold(attack: Attack, tmp_path: Path):
    case = attack.start(tmp_path)
    for number in range(8):
        outcome = attempt(attack, case, 0, number, tmp_path)
        assert outcome.failure is None, outcome
    assert not list(tmp_path.iterdir())


def test_a_wrong_implementation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A millionth too much, in the output alone."""
    right = api.DENSE["sdpa"]

    def wrong(*given):
        out, soft_mask = right(*given)
        return out * (1 + 1e-6), soft_mask

    monkeypatch.setitem(api.DENSE, "sdpa", wrong)
    outcomes = [attempt(operations.ATTACK, operations.case, 0, n, tmp_path) for n in range(25)]
    found = [o for o in outcomes if o.failure is not None]
    assert found and all(re.match(r"out: (sdpa|auto), torch.float64", o.failure) for o in found)
    again = attempt(operations.ATTACK, operations.case, 0, found[0].case, tmp_path)
    assert again.failure == found[0].failure
    monkeypatch.setitem(api.DENSE, "sdpa", right)
    assert attempt(operations.ATTACK, operations.case, 0, found[0].case, tmp_path).failure is None


def test_a_vote_too_few_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache that holds one token fewer than it may, when tokens come one by one."""
    right = models.piecewise

    def wrong(model, ids, mask, sizes, how):
        short = how is not None and how["budget"] is not None and len(sizes) > 1
        return right(model, ids, mask, sizes, {**how, "budget": max(how["budget"] - 1, 4)} if short else how)

    monkeypatch.setattr(models, "piecewise", wrong)
    outcomes = [attempt(models.ATTACK, models.case, 0, n, tmp_path) for n in range(25)]
    assert any(o.failure is not None and "logits are" in o.failure for o in outcomes)


def crash(draw, place):
    if place.name == "case-1":
        os.kill(os.getpid(), signal.SIGKILL)
    if place.name == "case-2":
        time.sleep(60)
    if place.name == "case-3":
        raise Broken("three")
    return "fine"


def test_what_crashes_or_hangs_ends_no_attack(tmp_path: Path):
    attack = Attack("some", "nothing", 1.0, lambda folder: crash, limit=0.5)
    outcomes = list(runner.run(attack, 0, 20, tmp_path, most=5))
    assert [o.case for o in outcomes] == [0, 1, 2, 3, 4]
    assert [o.failure for o in outcomes] == [
        None,
        "its process ended with code -9",
        "took longer than 0.5 seconds",
        "three",
        None,
    ]


def test_commands_are_run_killed_and_judged(tmp_path: Path):
    folder = tmp_path / "here"
    folder.mkdir()
    assert "selective" in commands.heedful(["ls"], folder).out
    wrong = commands.heedful(["ls", "--xyzzy"], folder)
    assert wrong.code == 2
    wrong.check("a word that is unknown")

    def write() -> int:
        for number in itertools.count():
            (folder / str(number)).touch()
            if number == 5:
                raise ValueError("six files")

    done = commands.forked(write, folder)
    assert (done.code, done.changes) == (1, 6)
    with pytest.raises(Broken, match="six: a traceback: "):
        done.check("six")
    for path in folder.iterdir():
        path.unlink()
    assert commands.forked(write, folder, kill_at=3).code == -9
    assert len(list(folder.iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    late = commands.forked(lambda: time.sleep(60), folder, limit=0.2)
    assert late.late and late.code == -9


def test_damage_is_the_same_for_the_same_case(tmp_path: Path):
    for name, damage in files.DAMAGES.items():
        left = []
        for _ in range(2):
            file = tmp_path / "config.json"
            file.write_text(json.dumps({"a": [1, {"b": 2}], "c": "text"}))
            damage(source_of(0, "files", 3), file)
            left.append(commands.contents(tmp_path))
            file.rmdir() if file.is_dir() else file.unlink(missing_ok=True)
        assert left[0] == left[1], name


def test_the_page_says_what_was_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    words = ["--only", "operations", "--case", "3", "--minutes", "1", "--seed", "5", "--out", str(out)]
    assert entry.main(words) == 0
    assert "operations: 1 cases, 0 failures" in capsys.readouterr().out
    page = (out / "README.md").read_text(encoding="utf-8")
    assert "| operations | 1 | 0 |" in page and "Seed 5, commit " in page
    (row,) = [json.loads(line) for line in (out / "cases.jsonl").read_text().splitlines()]
    assert (row["attack"], row["cases"]) == ("operations", 1)

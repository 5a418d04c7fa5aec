"""The tasks that need no network: what their documents are."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason='pip install "heedful[tasks]"')

from heedful.hf.load import load_tokenizer
from heedful.lm_eval.offline import blimp, made, scoring, text
from heedful.lm_eval.tasks import OURS, SIZED, Given, load_tasks


def documents(task: str, folder: Path, **given: Any) -> list[dict[str, Any]]:
    found = getattr(made, task)(pretrained=str(folder), **{"length": 400, "examples": 5, **given})
    return list(found["test"])


@pytest.mark.parametrize("task", SIZED)
@pytest.mark.parametrize("which", ["trained", "stock"])
def test_as_long_as_asked_and_always_the_same(task: str, which: str, request: pytest.FixtureRequest):
    folder: Path = request.getfixturevalue(which)
    tokenizer = load_tokenizer(folder)
    for length in (400, 700):
        found = documents(task, folder, length=length)
        assert len(found) == 5
        assert found == documents(task, folder, length=length)
        assert found != documents(task, folder, length=length, seed=1)
        for doc in found:
            answer = doc.get("answer") or f" {', '.join(doc['answers'])}."
            size = len(tokenizer(doc["prompt"] + answer)["input_ids"])
            assert (
                length - 90 <= size < length
            )  # one is left for the start token; a sentence more has no room
    with pytest.raises(ValueError, match=rf"task {task}: expected a length of \d+ tokens or more"):
        documents(task, folder, length=12)


@pytest.mark.parametrize("task, facts", [("needle", 1), ("needle_multikey", 4)])
def test_needles(trained: Path, task: str, facts: int):
    places = []
    for doc in documents(task, trained, length=900, examples=20):
        said = dict(re.findall(r"The number of (\w+) is (\d{5})\.", doc["prompt"]))
        asked = re.search(r"What is the number of (\w+)\?\nAnswer: The number of \1 is$", doc["prompt"])
        assert asked is not None
        assert len(said) == facts
        assert doc["answers"] == [said[asked[1]]]
        places.append(doc["prompt"].index(doc["answers"][0]) / len(doc["prompt"]))
    assert min(places) < 0.25
    assert max(places) > 0.55


def test_variables(trained: Path):
    for doc in documents("variable_tracking", trained, length=900):
        values: dict[str, str] = {}
        for name, said in re.findall(r"VAR (\w+) = (\w+)\.", doc["prompt"]):
            values[name] = values.get(said, said)  # what it is set to was said before
        asked = re.search(r"the value (\d{5})\?", doc["prompt"])
        assert asked is not None
        assert len(values) == 8
        assert doc["answers"] == [name for name, value in values.items() if value == asked[1]]
        assert len(doc["answers"]) == 4


def test_copy(trained: Path):
    for doc in documents("copy", trained):
        words = re.search(r"^Words: (.*)\.\nThe same words:$", doc["prompt"])
        assert words is not None
        assert doc["answer"] == f" {words[1]}"
        assert len(set(words[1].split())) == len(words[1].split()) > 20


def test_pairs(trained: Path):
    found = documents("mqar", trained, examples=8)
    for start in (0, 4):
        four = found[start : start + 4]
        text, _, _ = four[3]["prompt"].partition("\n")
        values = dict(re.findall(r"(\w+) (\d{3})", text))
        asked = [re.search(r"(\w+)$", doc["prompt"]) for doc in four]
        keys = [match[1] for match in asked if match is not None]
        assert len(set(keys)) == 4
        assert [doc["answer"] for doc in four] == [f" {values[key]}" for key in keys]
        for before, after in pairwise(four):  # the answers so far are in front of each question
            assert after["prompt"].startswith(before["prompt"] + before["answer"] + ", ")


def test_scores():
    found = {"answers": ["BAZU", "ZOFI"]}
    assert scoring.found(found, [" BAZU, and (ZOFI)."]) == {"found": 1.0}
    assert scoring.found(found, [" BAZUX, ZOFI"]) == {"found": 0.5}
    assert scoring.answered({"answer": " 12é"}, [(-3.0, True)]) == {"acc": 1, "bits_per_byte": (-3.0, 5)}


def write_blimp(folder: Path, counts: dict[str, int]) -> Path:
    folder.mkdir(parents=True)
    for name, count in counts.items():
        lines = [
            json.dumps({"sentence_good": f"{name} {n}", "sentence_bad": f"no {n}", "UID": name, "field": "x"})
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_blimp_takes_one_of_each_paradigm_in_turn(tmp_path: Path):
    folder = write_blimp(tmp_path / "blimp", {"islands": 3, "agreement": 1})
    for place in (folder, tmp_path):
        found = list(blimp.blimp(task_data=str(place), pretrained="unused")["test"])
        assert [pair["part"] for pair in found] == ["agreement", "islands", "islands", "islands"]
        assert found[1]["choices"] == ["islands 0", "no 0"]


def test_blimp_without_its_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="--task-data FOLDER"):
        blimp.blimp()
    with pytest.raises(FileNotFoundError, match=r"holds no \.jsonl files"):
        blimp.blimp(task_data=str(tmp_path))
    for damaged in ("{}", "no json", "[1]"):
        (tmp_path / "a.jsonl").write_text(f"{damaged}\n")
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected JSON with sentence_good"):
            blimp.blimp(task_data=str(tmp_path))


def test_text(text_file: Path):
    (document,) = text.documents(data=str(text_file))["test"]
    assert document["text"] == text_file.read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="--data FILE"):
        text.documents()


def test_names(trained: Path):
    given = Given(trained, lengths=(300, 500), examples=2)
    loaded = load_tasks(["copy", "needle"], given)
    assert [(task.name, task.tokens) for task in loaded] == [
        ("copy_300", 300),
        ("copy_500", 500),
        ("needle_300", 300),
        ("needle_500", 500),
    ]
    assert set(SIZED) < set(OURS)
    with pytest.raises(ValueError, match="named twice"):
        load_tasks(["copy", "copy"], given)
    with pytest.raises(ValueError, match="expected one task or more"):
        load_tasks([], given)

"""Tasks made from a seed: needles, variables, copying and associative recall, as long as is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from datasets import Dataset

from heedful.hf.load import load_tokenizer
from heedful.lm_eval.offline.words import most_that_fit, sentences, words

QUERIES = 4
"""How many pairs of one text `mqar` asks for; each is a document."""
SENTENCE = 6
"""Tokens that a sentence takes at least."""


def needle(**given: Any) -> dict[str, Dataset]:
    """One fact in a text of no meaning, asked for at its end, after RULER (Hsieh et al., 2024), "niah_single"."""
    return _documents("needle", lambda paper: _needle(paper, 1), **given)


def needle_multikey(**given: Any) -> dict[str, Dataset]:
    """Four such facts, of which one is asked for; RULER's "niah_multikey"."""
    return _documents("needle_multikey", lambda paper: _needle(paper, 4), **given)


def variable_tracking(**given: Any) -> dict[str, Dataset]:
    """Two chains of four assignments in such a text; all variables of one value are asked for. RULER's "vt"."""
    return _documents("variable_tracking", lambda paper: _variables(paper, 2, 4), **given)


def copy(**given: Any) -> dict[str, Dataset]:
    """Words, and the same words again."""
    return _documents("copy", _copy, **given)


def mqar(**given: Any) -> dict[str, Dataset]:
    """Pairs of a key and a value, then keys of which the values are asked for (Arora et al., 2023, "Zoology")."""
    return _documents("mqar", _pairs, **given)


@dataclass(frozen=True)
class Paper:
    """What a text is written on."""

    draw: Random
    tokenizer: Any
    length: int
    """Tokens that there is room for."""

    def fill(self, build: Callable[[int], str], least: int, most: int) -> int:
        """How many parts, of those at hand, make a text that fits."""
        return most_that_fit(build, self.tokenizer, self.length, least, most)


def _documents(
    task: str,
    write: Callable[[Paper], list[dict[str, Any]]],
    *,
    pretrained: str,
    length: int = 512,
    examples: int = 100,
    seed: int = 0,
    **rest: Any,
) -> dict[str, Dataset]:
    """`examples` documents whose text with the answer has at most `length` tokens, as the split "test".

    Raises:
        ValueError: where `length` is too short for the task.
    """
    tokenizer = load_tokenizer(pretrained)
    found: list[dict[str, Any]] = []
    while len(found) < examples:
        draw = Random(f"{task} {length} {seed} {len(found)}")
        try:
            found += write(Paper(draw, tokenizer, length - 1))  # one is for the start token
        except ValueError as error:
            raise ValueError(f"task {task}: {error}") from None
    return {"test": Dataset.from_list(found[:examples])}


def _needle(paper: Paper, n_facts: int) -> list[dict[str, Any]]:
    draw = paper.draw
    names, numbers = words(draw, n_facts, 3), [str(n) for n in draw.sample(range(10000, 100000), n_facts)]
    facts = [f"The number of {name} is {number}." for name, number in zip(names, numbers, strict=True)]
    places = [draw.random() for _ in facts]
    end = f"\nQuestion: What is the number of {names[0]}?\nAnswer: The number of {names[0]} is"
    return [{"prompt": _strewn(paper, facts, places, end, f" {numbers[0]}."), "answers": numbers[:1]}]


def _variables(paper: Paper, n_chains: int, per_chain: int) -> list[dict[str, Any]]:
    draw = paper.draw
    names = [name.upper() for name in words(draw, n_chains * per_chain)]
    values = [str(n) for n in draw.sample(range(10000, 100000), n_chains)]
    lines, places = list[str](), list[float]()
    for chain, value in enumerate(values):
        own = names[chain * per_chain :][:per_chain]
        lines += [f"VAR {name} = {said}." for name, said in zip(own, [value, *own], strict=False)]
        places += sorted(draw.random() for _ in own)  # each names the one before
    answers, value = names[:per_chain], values[0]
    end = f"\nQuestion: Which variables have the value {value}?\nAnswer: The variables with the value {value} are"
    return [{"prompt": _strewn(paper, lines, places, end, f" {', '.join(answers)}."), "answers": answers}]


def _strewn(paper: Paper, facts: list[str], places: list[float], end: str, answer: str) -> str:
    """Sentences with the facts at their places, from 0, the beginning, to 1, and the question behind them."""
    most = paper.length // SENTENCE
    filler = sentences(paper.draw, most)
    order = sorted(range(len(facts)), key=places.__getitem__)

    def build(n: int) -> str:
        text = filler[:n]
        for already, i in enumerate(order):
            text.insert(int(places[i] * (n + 1)) + already, facts[i])
        return " ".join(text) + end

    return build(paper.fill(lambda n: build(n) + answer, 0, most))


def _copy(paper: Paper) -> list[dict[str, Any]]:
    pool = words(paper.draw, paper.length // 2)

    def prompt(n: int) -> str:
        return f"Words: {' '.join(pool[:n])}.\nThe same words:"

    n = paper.fill(lambda n: f"{prompt(n)} {' '.join(pool[:n])}", 1, len(pool))
    return [{"prompt": prompt(n), "answer": f" {' '.join(pool[:n])}"}]


def _pairs(paper: Paper) -> list[dict[str, Any]]:
    draw = paper.draw
    pool = [f"{key} {draw.randrange(100, 1000)}" for key in words(draw, paper.length // 2)]
    # One of each quarter of the text, in any order.
    places = [(quarter + draw.random()) / QUERIES for quarter in draw.sample(range(QUERIES), QUERIES)]

    def text(n: int, asked: int) -> str:
        return f"{', '.join(pool[:n])}.\n{', '.join(pool[int(place * n)] for place in places[:asked])}"

    n = paper.fill(lambda n: text(n, QUERIES), QUERIES, len(pool))
    parts = [text(n, asked).rpartition(" ") for asked in range(1, QUERIES + 1)]
    return [{"prompt": prompt, "answer": f" {value}"} for prompt, _, value in parts]

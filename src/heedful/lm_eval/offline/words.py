"""Words and sentences of no meaning, and as many of them as fit a number of tokens."""

from collections.abc import Callable
from random import Random
from typing import Any

SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwxyz" for vowel in "aeiou"]
ADJECTIVES = ["old", "quiet", "green", "small", "heavy", "bright", "cold", "tall", "early", "plain"]
NOUNS = ["house", "river", "garden", "teacher", "window", "road", "letter", "horse", "table", "winter"]
VERBS = ["stands near", "waits for", "looks at", "belongs to", "comes before", "lies behind"]


def words(draw: Random, count: int, syllables: int = 2) -> list[str]:
    """`count` different words, such as `bazu`.

    Raises:
        ValueError: where there are fewer.
    """
    kinds = len(SYLLABLES) ** syllables
    if count > kinds:
        return words(draw, count, syllables + 1)
    picked = draw.sample(range(kinds), count)
    return ["".join(SYLLABLES[n // 100**i % 100] for i in range(syllables)) for n in picked]


def sentences(draw: Random, count: int) -> list[str]:
    """Sentences that say nothing of what is asked."""
    pick = draw.choice
    return [
        f"The {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} the {pick(ADJECTIVES)} {pick(NOUNS)}."
        for _ in range(count)
    ]


def most_that_fit(build: Callable[[int], str], tokenizer: Any, length: int, least: int, most: int) -> int:
    """The largest n, from `least` to `most`, for which the text `build(n)` has at most `length` tokens.

    Raises:
        ValueError: where `least` is too many.
    """

    def size(n: int) -> int:
        return len(tokenizer(build(n))["input_ids"])

    if (needed := size(least)) > length:
        raise ValueError(
            f"expected a length of {needed + 1} tokens or more with this tokenizer, got {length + 1}"
        )
    low, high = least, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= length else (low, middle)
    return low

"""From what a model answered to figures."""

from collections.abc import Sequence
from typing import Any


def found(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The share of the answers that the continuation holds, whole words alone."""
    said = "".join(letter if letter.isalnum() else " " for letter in results[0]).split()
    return {"found": sum(answer in said for answer in doc["answers"]) / len(doc["answers"])}


def answered(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Whether the whole answer is the most likely continuation, and its bits per byte."""
    log_likelihood, is_greedy = results[0]
    return {"acc": int(is_greedy), "bits_per_byte": (log_likelihood, len(doc["answer"].encode()))}

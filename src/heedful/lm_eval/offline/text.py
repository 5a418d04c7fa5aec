"""A text of the user's own."""

from typing import Any

from datasets import Dataset

from heedful.data import read_validation


def documents(*, data: str | None = None, text_column: str = "text", **rest: Any) -> dict[str, Dataset]:
    """The documents of a text, as the split "test".

    Args:
        data: a file, or a folder of texts.
        text_column: which column holds the texts, where it is a table.
        **rest: what other tasks read.

    Raises:
        FileNotFoundError: without one.
        ValueError: for a text that cannot be used.
    """
    if data is None:
        raise FileNotFoundError(
            "the task 'text' reads a text, and none was named: --data FILE "
            """(with lm_eval: --metadata '{"data": "FILE"}')"""
        )
    return {"test": Dataset.from_list([{"text": text} for text in read_validation(data, column=text_column)])}

"""What functions tell torch.compile."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """Decorator: the compiler runs it once and keeps the result.

    What `torch.compiler.assume_constant_result` does, which would import the whole compiler now.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

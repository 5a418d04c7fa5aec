"""What every form promises, as checks that run on a form of your own too: `check_form("my_form")`.

Each check is a function in `CHECKS`; `CHECKS[name](attention, score, **options)` returns nothing or raises
`AssertionError`. The keywords `batch`, `length`, `seed` and `device` say on what it runs; all others are
options of the form.
"""

from typing import Any

from heedful.testing import bookkeeping, evicting, numerics, sequence  # noqa: F401  (they fill CHECKS)
from heedful.testing.promise import CHECKS, Check

__all__ = ["CHECKS", "Check", "check_form"]


def check_form(attention: str, score: str = "softmax", **options: Any) -> None:
    """Run every check on one attention x score; the form must be registered.

    Args:
        attention: a name from `heedful.available()["attention"]`.
        score: a name from `heedful.available()["score"]`.
        **options: options of the form; `d_model=32, n_heads=4` unless given. `batch`, `length`, `seed` and
            `device` go to the checks.

    Raises:
        AssertionError: naming every broken promise, the sizes and the largest error.
    """
    broken: list[Exception] = []
    for check in CHECKS.values():
        try:
            check(attention, score, **options)
        except Exception as error:
            broken.append(error)
    if broken:
        lines = [str(e) if isinstance(e, AssertionError) else repr(e) for e in broken]
        raise AssertionError("\n".join([f"{len(broken)} of {len(CHECKS)} broken:", *lines])) from broken[0]

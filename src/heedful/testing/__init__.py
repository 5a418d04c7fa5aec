"""What every form promises, as checks that run on a form of your own too.

`check_form("my_attention")`, `check_form(score="my_score")` or both.

Each check is a function in `CHECKS`; `CHECKS[name](attention, score, **options)` returns nothing or raises
`AssertionError`. The keywords `batch`, `length`, `seed` and `device` say on what it runs; all others are
options of the form.
"""

from itertools import product
from typing import Any

from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.testing import bookkeeping, evicting, numerics, sequence  # noqa: F401  (they fill CHECKS)
from heedful.testing.promise import CHECKS, Check

__all__ = ["CHECKS", "Check", "check_form"]


ATTENTIONS_FOR_A_SCORE = ["mha", "mqa", "sas", "mla"]
"""As many heads of keys as of queries, one, queries of another size than values, keys that fold into queries."""
SCORES_FOR_AN_ATTENTION = ["softmax", "selective", "gated"]
"""Nothing more, state for every token, and parameters and the layer's input."""


def check_form(attention: str | None = None, score: str | None = None, **options: Any) -> None:
    """Run every check on one attention x score; the form must be registered.

    A name alone is checked with several counterparts: a score on `mha`, `mqa`, `sas` and `mla`, an attention under
    `softmax`, `selective` and `gated`.

    Args:
        attention: a name from `heedful.available()["attention"]`.
        score: a name from `heedful.available()["score"]`.
        **options: options of the form; `d_model=32, n_heads=4` unless given. `batch`, `length`, `seed` and
            `device` go to the checks.

    Raises:
        AssertionError: naming every broken promise, the sizes and the largest error.
        TypeError: without a name.
        ValueError: for an unknown name.
    """
    if attention is None and score is None:
        raise TypeError(
            'check_form needs a name: check_form("my_attention"), check_form(score="my_score"), or both'
        )
    attentions = ATTENTIONS_FOR_A_SCORE if attention is None else [attention]
    scores = SCORES_FOR_AN_ATTENTION if score is None else [score]
    for registry, names in ((ATTENTIONS, attentions), (SCORES, scores)):
        for name in names:
            registry[name]
    broken: list[Exception] = []
    for pair in product(attentions, scores):
        for check in CHECKS.values():
            try:
                check(*pair, **options)
            except Exception as error:
                broken.append(error)
    if broken:
        asked = len(CHECKS) * len(attentions) * len(scores)
        lines = [str(e) if isinstance(e, AssertionError) else repr(e) for e in broken]
        raise AssertionError("\n".join([f"{len(broken)} of {asked} broken:", *lines])) from broken[0]

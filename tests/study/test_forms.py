"""Forms that only studies have."""

from pathlib import Path

import pytest
import torch

import heedful
from heedful.attention.registry import SCORES
from heedful.attention.score import Score
from heedful.forms import load_forms, name_forms

FORMS = Path(__file__).parents[2] / "studies" / "forms"


@pytest.fixture
def votes() -> type[Score]:
    name_forms([str(FORMS / "votes.py")])
    load_forms()
    return SCORES["votes"].module_class


@pytest.mark.parametrize("segments", [None, [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2]])
@pytest.mark.parametrize("voter", [0, 2])
def test_votes_are_those_of_selective_attention(votes: type[Score], voter: int, segments: list[int] | None):
    q, k, v = torch.randn(3, 2, 3, 11, 4, dtype=torch.float64)
    score = votes(votes.Config(voter=voter), 3, 12)
    ids = None if segments is None else torch.tensor([segments, [0] * len(segments)])
    rest = {"x": torch.zeros(2, 11, 12), "state": {}, "key_mask": None, "segment_ids": ids}
    out, _ = score(q, k, v, scale=0.5, **rest)
    one = slice(voter, voter + 1)
    expected, _ = heedful.selective_attention(
        q, k, v, select_q=q[:, one], select_k=k[:, one], segment_ids=ids, scale=0.5
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("spared", "where"), [("spare_self", (4, 4)), ("spare_first", (4, 0))])
def test_who_is_not_spared(votes: type[Score], spared: str, where: tuple[int, int]):
    """One vote alone is large: it counts for later queries, and only where nobody is spared."""
    by, on = where
    q, k = torch.zeros(2, 1, 1, 8, 2)
    v = torch.randn(1, 1, 8, 3)
    q[0, 0, by] = 100.0
    k[0, 0, on, 0] = 100.0
    rest = {"x": torch.zeros(1, 8, 2), "state": {}, "key_mask": None, "segment_ids": None}
    for spares in (True, False):
        score = votes(votes.Config(**{spared: spares}), 1, 2)
        out, _ = score(q, k, v, scale=1.0, **rest)
        others = [i for i in range(8) if spares or i != on]
        torch.testing.assert_close(out[0, 0, 7], v[0, 0, others].mean(0))


def test_a_voter_that_is_not_there_and_padding(votes: type[Score]):
    with pytest.raises(ValueError, match="voter must be one of the heads 0 to 2, got 3"):
        votes(votes.Config(voter=3), 3, 12)
    score = votes(votes.Config(), 1, 2)
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(NotImplementedError, match="takes whole rows"):
        score(
            q,
            q,
            q,
            x=q[0],
            state={},
            key_mask=torch.ones(1, 4, dtype=torch.bool),
            segment_ids=None,
            scale=1.0,
        )

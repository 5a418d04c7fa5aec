"""Visibility, ranks and votes against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.ops.masks import rank_in_segment, visible_keys, voted_keys

CPU = torch.device("cpu")


@pytest.mark.parametrize("segmented", [False, True], ids=["one", "segments"])
@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@settings(max_examples=25)
@given(keys=st.integers(1, 9), earlier=st.integers(0, 8), seed=st.integers(0, 10**6))
def test_masks_equal_loops(padded: bool, segmented: bool, keys: int, earlier: int, seed: int):
    torch.manual_seed(seed)
    earlier = min(earlier, keys - 1)
    mask = torch.rand(2, keys) > 0.3 if padded else None
    ids = torch.randint(-2, 2, (2, keys)) if segmented else None
    queries = keys - earlier
    visible = visible_keys(queries, keys, mask, ids, CPU)
    rank = rank_in_segment(keys, mask, ids, CPU)
    voted = voted_keys(visible, rank).expand(2, -1, -1)
    visible, rank = visible.expand(2, -1, -1), rank.expand(2, -1)

    def real(b: int, j: int) -> bool:
        return mask is None or bool(mask[b, j])

    def together(b: int, i: int, j: int) -> bool:
        return ids is None or bool(ids[b, i] == ids[b, j])

    for b in range(2):
        for j in range(keys):
            before = sum(real(b, u) and together(b, u, j) for u in range(j))
            assert rank[b, j] == before
            for i in range(queries):
                here = earlier + i
                sees = j <= here and real(b, j) and real(b, here) and together(b, here, j)
                assert visible[b, i, j] == sees
                assert voted[b, i, j] == (sees and j != here and before > 0)


def test_ranks_in_long_rows():
    """Sorting equal ids must keep their order, which short rows do without being asked."""
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 2, (1, 2000)), torch.rand(1, 2000) > 0.3
    rank = rank_in_segment(2000, mask, ids, CPU)
    for segment in (0, 1):
        here = ids == segment
        real = mask & here
        assert torch.equal(rank[here], (real.long().cumsum(-1) - real.long())[here])

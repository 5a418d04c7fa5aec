"""What an unknown name could have been."""

import pytest
import torch

from heedful.ops import selective_attention
from heedful.ops.checks import did_you_mean, nearest


def test_nearest():
    assert nearest("selectiv", ["softmax", "selective"]) == "selective"
    assert nearest("xyzzy", ["softmax", "selective"]) is None
    assert nearest(None, ["softmax"]) is None
    assert nearest("ab", ["abcd"], cutoff=0.9) is None
    assert did_you_mean("sass", {"sas": 1}) == "did you mean 'sas'? "
    assert did_you_mean("xyzzy", {"sas": 1}) == ""


@pytest.mark.parametrize(("size", "v_size"), [(0, 3), (3, 0)])
def test_heads_without_features(size: int, v_size: int):
    q, v = torch.randn(1, 2, 4, size), torch.randn(1, 2, 4, v_size)
    with pytest.raises(
        ValueError, match=f"at least one feature, got D = {size} of q and k, E = {v_size} of v"
    ):
        selective_attention(q, q, v)

"""Gated attention: heads that a token can close."""

import torch

from heedful.attention import EvictingCache, build

SIZES = {"d_model": 16, "n_heads": 4}


def test_the_formula():
    torch.manual_seed(0)
    gated = build("gqa", "gated", **SIZES, n_kv_heads=2).double()
    plain = build("gqa", "softmax", **SIZES, n_kv_heads=2).double()
    plain.load_state_dict({n: t for n, t in gated.state_dict().items() if not n.startswith("score.")})
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    gate = torch.sigmoid(x @ gated.score.gate_proj.weight.T)  # (B, T, H)
    q, memory = plain.project(x, torch.arange(7)[None])
    heads, _ = plain.score(
        q, memory["k"], memory["v"], x=x, state={}, key_mask=None, segment_ids=None, scale=plain.scale
    )
    expected = plain.o_proj((heads.transpose(1, 2) * gate[..., None]).flatten(2))
    torch.testing.assert_close(gated(x), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_gate_is_that_of_the_query_whatever_is_evicted():
    """Closing all gates of a token gives zeros under every cache."""
    module = build("mha", "gated", **SIZES).double()
    module.score.gate_proj.weight.fill_(-1e4)
    x = torch.rand(1, 9, 16, dtype=torch.float64) + 0.1
    for cache in (None, EvictingCache(3, "streaming")):
        pieces = [x] if cache is None else x.split([5, 1, 1, 2], dim=1)
        for piece in pieces:
            assert not module(piece, cache=cache).any()

"""A decoding step over slots compiles whole, once, and computes the same."""

import pytest
import torch

from heedful.attention import build
from heedful.attention.eviction import EvictingCache

FORMS = [
    ("mha", "selective", "selective", {}),
    ("gqa", "selective", "selective", {"n_kv_heads": 2}),
    ("sas", "selective", "selective", {"cache": "compact"}),
    ("mla", "selective", "selective", {}),
    ("sas_linear", "softmax", "streaming", {"n_kv_heads": 2}),
    ("mha", "softmax", "h2o", {}),
    ("gqa", "softmax", "snapkv", {"n_kv_heads": 2}),
    ("gqa", "softmax", "keydiff", {"n_kv_heads": 2}),
]


def compiled_equals_eager(form, backend):
    attention, score, policy, options = form
    torch.manual_seed(0)
    layer = build(attention, score=score, d_model=16, n_heads=4, init_logit_std=2.0, **options).eval()
    torch._dynamo.reset()

    def step(x, cache):
        return layer(x, cache=cache)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    plain, fast = EvictingCache(7, policy), EvictingCache(7, policy)
    x = torch.randn(2, 30, 16)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for t in range(30):
            expected, got = step(x[:, t : t + 1], plain), compiled(x[:, t : t + 1], fast)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(fast.positions, plain.positions)
    # allocating, filling with a fixed and with any number of slots, full: not one graph per token
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 7


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[pytest.mark.slow] * (form != FORMS[1])) for form in FORMS],
    ids=lambda form: "-".join(form[:3]),
)
def test_compiled_step_equals_eager(form):
    compiled_equals_eager(form, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS[:1], ids=["mha"])
def test_inductor_step_equals_eager(form):
    compiled_equals_eager(form, "inductor")

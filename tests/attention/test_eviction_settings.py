"""`Eviction`: one value for every call that evicts."""

import json

import pytest

from heedful import EvictingCache, Eviction, LayerCache


def test_what_callers_write_becomes_one_value():
    assert Eviction.of(None) == Eviction.of("full") == Eviction()
    assert Eviction.of(8) == Eviction(8)
    assert Eviction.of([4, 6], "streaming") == Eviction((4, 6), "streaming")
    assert Eviction.of(Eviction(8, "h2o", 2)) == Eviction(8, "h2o", 2)
    assert Eviction.of(Eviction(8, "h2o", 2), kv_policy="tova") == Eviction(8, "tova", 2)
    assert Eviction.of(None, kv_threshold=20.0, kv_evict_every=3) == Eviction(None, "selective", 3, 20.0)
    assert Eviction.of({"budget": 8, "policy": "random"}) == Eviction(8, "random")


def test_it_is_saved_whole():
    for eviction in (Eviction(), Eviction(8, "h2o", 2), Eviction([4, 6], threshold=3.5)):
        assert Eviction.of(json.loads(json.dumps(eviction.to_dict()))) == eviction


def test_a_cache_for_each_layer():
    first, second = Eviction([4, 6], "streaming", 2).layer_caches(2)
    assert isinstance(first, EvictingCache)
    assert isinstance(second, EvictingCache)
    assert (first.rule.budget, second.rule.budget, second.rule.evict_every) == (4, 6, 2)
    assert second.policy.name == "streaming"
    assert [type(cache) for cache in Eviction().layer_caches(2)] == [LayerCache, LayerCache]
    assert Eviction(threshold=9.0).layer_caches(1)[0].rule.threshold == 9.0
    with pytest.raises(ValueError, match=r"one entry per layer \(3\), got 2"):
        Eviction([4, 6]).layer_caches(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_budget": 1}, "whole number >= 2"),
        ({"kv_budget": True}, "whole number >= 2"),
        ({"kv_budget": 8.0}, 'must be "full", a whole number or a list'),
        ({"kv_budget": "half"}, 'must be "full", a whole number or a list'),
        ({"kv_budget": []}, "a whole number for every layer"),
        ({"kv_budget": [4, None]}, "a whole number for every layer"),
        ({"kv_budget": 8, "kv_policy": "stream"}, "did you mean 'streaming'"),
        ({"kv_budget": 8, "kv_evict_every": 0}, "evict_every must be"),
        ({"kv_evict_every": 2}, "nothing is evicted without"),
        ({"kv_threshold": 0.0}, "threshold must be"),
        ({"kv_budget": {"budgets": 8}}, r"unknown settings of an eviction: \['budgets'\]"),
    ],
    ids=str,
)
def test_what_is_unsound_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Eviction.of(**settings)

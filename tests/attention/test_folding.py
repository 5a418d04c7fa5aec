"""One token reads what is cached as it is, without keys and values, and where it does not, it is the same."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heedful import available
from heedful.attention import Attention, EvictingCache, KVCache, LayerCache, SoftmaxScore, build
from heedful.attention.eviction import POLICIES
from heedful.attention.folding import Folding

FORMS: dict[str, dict[str, Any]] = {
    "mla": {"attention": "mla"},
    "mla-q-latent": {"attention": "mla", "q_lora_rank": 5, "rope_head_dim": 2},
    "sas_linear": {"attention": "sas_linear", "n_kv_heads": 2},
}
CACHES: dict[str, dict[str, Any]] = {
    "full": {},
    **{policy: {"budget": 5, "policy": policy} for policy in POLICIES},
    "every-2": {"budget": 4, "policy": "streaming", "evict_every": 2},
    "threshold": {"budget": None, "threshold": 0.5},
}


SCORES = available()["score"]


def layer_of(form: str, score: str = "selective") -> Attention:
    torch.manual_seed(0)
    return build(score=score, d_model=16, n_heads=4, init_logit_std=1.5, **FORMS[form]).double().eval()


def cache_of(name: str) -> KVCache:
    return EvictingCache(**CACHES[name]) if CACHES[name] else LayerCache(block=4)


@torch.no_grad()
def decoded(layer: Attention, cache: KVCache, prompt: int = 0, **masks: Tensor) -> Tensor:
    """The outputs of 12 tokens, one after the other but for a prompt."""
    x = torch.randn(2, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sizes = [prompt] * (prompt > 0) + [1] * (12 - prompt)
    parts = zip(x.split(sizes, 1), *(mask.split(sizes, 1) for mask in masks.values()), strict=True)
    return torch.cat([layer(x, cache=cache, **dict(zip(masks, m, strict=True))) for x, *m in parts], 1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("form", FORMS)
def test_folded_equals_expanded(form: str, cache: str, monkeypatch: pytest.MonkeyPatch):
    """Token by token, after a prompt, with padding."""
    layer, mask = layer_of(form), torch.arange(12) >= torch.tensor([[0], [3]])
    folded = [decoded(layer, cache_of(cache), prompt) for prompt in (0, 6)]
    padded = decoded(layer, cache_of(cache), key_mask=mask)
    monkeypatch.setattr(Folding, "_may_fold", lambda self, cache: False)
    expanded = decoded(layer, cache_of(cache))
    torch.testing.assert_close(folded, [expanded, expanded], rtol=1e-11, atol=1e-11)
    expanded = decoded(layer, cache_of(cache), key_mask=mask)
    torch.testing.assert_close(padded[mask], expanded[mask], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "score",
    [
        s if s in ("selective", "forgetting") else pytest.param(s, marks=pytest.mark.exhaustive)
        for s in SCORES
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_single_token_makes_no_keys(form: str, score: str, monkeypatch: pytest.MonkeyPatch):
    layer = layer_of(form, score)
    made: list[int] = []
    keys_values = type(layer).keys_values

    def counted(self: Attention, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        made.append(1)
        return keys_values(self, memory)

    monkeypatch.setattr(type(layer), "keys_values", counted)
    for name in CACHES:
        measures = name in ("keydiff", "threshold")
        if score != "selective" and name in ("selective", "threshold"):
            continue
        made.clear()
        decoded(layer, cache_of(name), prompt=3)
        assert (len(made) > 1) == measures, name  # once, for the prompt


def test_foreign_scores_and_changed_layers_are_given_keys():
    class Bounded(SoftmaxScore):
        """Not a product of q and k alone."""

        bilinear = False

        def forward(self, q: Tensor, *kv: Tensor, **rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return super().forward(q / (1 + q.norm(dim=-1, keepdim=True)), *kv, **rest)

    x = torch.randn(2, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for form in FORMS:
        layer = layer_of(form, "softmax")
        assert isinstance(layer, Folding)
        changed = [copy.deepcopy(layer) for _ in layer.folded_layers()]
        for i, other in enumerate(changed):
            other.folded_layers()[i].register_forward_hook(lambda layer, given, out: 2 * out)
        foreign = copy.deepcopy(layer)
        foreign.score = Bounded(layer.score.config, layer.score.n_heads, 16)
        for other in (*changed, foreign):
            torch.testing.assert_close(decoded(other, LayerCache()), other(x), rtol=1e-11, atol=1e-11)
            assert (other(x) - layer(x)).abs().max() > 1e-3


def test_tokens_are_taken_back():
    for form in FORMS:
        layer = layer_of(form)
        x = torch.randn(2, 9, 16, dtype=torch.float64)
        for make in (LayerCache, lambda: EvictingCache(4)):
            with torch.no_grad():
                straight = decode(layer, make(), x[:, [0, 1, 2, 3, 7, 8]])
                cache = make()
                before = decode(layer, cache, x[:, :4])
                cache.recording = True
                decode(layer, cache, x[:, 4:7])
                cache.crop(3)
                after = decode(layer, cache, x[:, 7:])
            torch.testing.assert_close(torch.cat((before, after), 1), straight, rtol=1e-12, atol=1e-12)


def decode(layer: nn.Module, cache: KVCache, x: Tensor) -> Tensor:
    return torch.cat([layer(token, cache=cache) for token in x.split(1, 1)], 1)


def test_a_cache_that_asks_for_sizes_must_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(EvictingCache, "measures_keys", False)
    with pytest.raises(NotImplementedError, match="must say that it measures_keys"):
        decoded(layer_of("mla"), cache_of("threshold"))


def test_selectors_of_key_heads_need_key_heads():
    for form, options in (("mla", {}), ("tpa", {}), ("sas_linear", {}), ("sas", {"cache": "compact"})):
        sizes = {"d_model": 16, "n_heads": 4, "selector": "added", **options}
        build(form, "selective", **sizes)
        with pytest.raises(ValueError, match="selectors must be 1, as all heads share what is cached, got 4"):
            build(form, "selective", **sizes, selectors=4)

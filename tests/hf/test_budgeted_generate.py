"""`generate` and `evaluate_nll` under a budget, a threshold and `evict_every`: one rule in every mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from heedful.attention.eviction import EvictingCache
from heedful.hf import HeedfulCache, HeedfulForCausalLM

Make = Callable[..., HeedfulForCausalLM]
NEW = 12
HOW: dict[str, dict[str, Any]] = {
    "budget": {"kv_budget": 5},
    "budgets": {"kv_budget": [3, 7]},
    "every 3": {"kv_budget": [4, 5], "kv_evict_every": 3},
    "grace": {"kv_budget": 6, "kv_grace": 3, "kv_first": 2},
    "threshold": {"kv_threshold": 0.7},
    "threshold every 2": {"kv_threshold": 0.7, "kv_evict_every": 2},
    "all": {"kv_budget": 6, "kv_evict_every": 2, "kv_threshold": 0.7},
    "streaming": {"kv_budget": 6, "kv_policy": "streaming"},
    "random every 2": {"kv_budget": 5, "kv_policy": "random", "kv_evict_every": 2},
    "h2o": {"kv_budget": [5, 4], "kv_policy": "h2o"},
    "tova every 2": {"kv_budget": 4, "kv_policy": "tova", "kv_evict_every": 2},
    "snapkv": {"kv_budget": [7, 5], "kv_policy": "snapkv", "kv_first": 2},
    "keydiff every 2": {"kv_budget": 5, "kv_policy": "keydiff", "kv_evict_every": 2},
}
how = pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())


@pytest.fixture
def model(make_model: Make) -> HeedfulForCausalLM:
    """Untied, or it repeats itself."""
    return make_model("gqa", "selective", tie_word_embeddings=False)


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(1, 50, (2, 14), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def mask(prompt: Tensor) -> Tensor:
    """Row 1 begins with padding."""
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    return mask


def cache_of(kv_budget: Any = "full", kv_policy: str = "selective", **more: Any) -> HeedfulCache:
    return HeedfulCache(2, kv_budget, kv_policy, **more)


def generate(model: HeedfulForCausalLM, ids: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(ids, **options)


@torch.no_grad()
def stepwise(
    model: HeedfulForCausalLM, ids: Tensor, mask: Tensor, new: int, **how: Any
) -> tuple[Tensor, Tensor]:
    """Greedy decoding that reads the prompt token by token as well: the tokens, and all logits."""
    cache, logits = cache_of(**how), []
    for t in range(ids.shape[1] + new - 1):
        step = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
        logits.append(step)
        if t == ids.shape[1] - 1:
            ids = torch.cat((ids, step[:, -1].argmax(-1, keepdim=True)), dim=1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return ids, torch.cat(logits, dim=1)


@how
def test_generate_is_stepwise_decoding(
    model: HeedfulForCausalLM, prompt: Tensor, mask: Tensor, how: dict[str, Any]
):
    """With the prompt at once or in chunks, padded or alone."""
    expected, _ = stepwise(model, prompt, mask, NEW, **how)
    result = generate(model, prompt, attention_mask=mask, **how)
    assert torch.equal(result.sequences, expected)
    chunked = generate(model, prompt, attention_mask=mask, prefill_chunk_size=4, **how)
    assert torch.equal(chunked.sequences, expected)
    assert chunked.past_key_values.kept == result.past_key_values.kept
    alone = generate(model, prompt[1:, 5:], **how)
    assert torch.equal(alone.sequences[0], expected[1, 5:])
    assert sum(result.past_key_values.stats.evictions) > 0
    assert not torch.equal(generate(model, prompt, attention_mask=mask).sequences, expected)


@how
def test_evaluation_is_stepwise_decoding(
    model: HeedfulForCausalLM, prompt: Tensor, mask: Tensor, how: dict[str, Any]
):
    _, logits = stepwise(model, prompt, mask, 1, **how)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), prompt[:, 1:], reduction="none"
    )
    losses = losses * mask[:, 1:] * mask[:, :-1]
    got = model.evaluate_nll(prompt, mask, reduction="none", **how)
    torch.testing.assert_close(got, losses)
    mean = model.evaluate_nll(prompt, mask, **how)
    torch.testing.assert_close(mean, losses.sum() / (13 + 8))
    assert (mean - model.evaluate_nll(prompt, mask)).abs() > 1e-4


@pytest.mark.parametrize(
    ("how", "chunk"),
    [
        ({"kv_budget": 5}, 6),
        ({"kv_budget": [3, 7]}, 2),
        ({"kv_budget": 4, "kv_evict_every": 3}, 5),
        ({"kv_budget": 4, "kv_threshold": 2.0}, 8),
    ],
    ids=str,
)
def test_a_prompt_in_chunks_never_holds_more_than_budget_and_chunk(
    model: HeedfulForCausalLM, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], chunk: int
):
    ids = torch.randint(1, 50, (1, 61), generator=torch.Generator().manual_seed(4))
    whole = generate(model, ids, **how)
    widest: list[int] = []
    attend = type(model.layers[0].attention.score).attend_pruned

    def watched(score: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        widest.append(k.shape[2])
        return attend(score, q, k, *args, **kwargs)

    monkeypatch.setattr(type(model.layers[0].attention.score), "attend_pruned", watched)
    chunked = generate(model, ids, prefill_chunk_size=chunk, **how)
    assert torch.equal(chunked.sequences, whole.sequences)
    budgets = how["kv_budget"] if isinstance(how["kv_budget"], list) else [how["kv_budget"]] * 2
    slots = [budget + how.get("kv_evict_every", 1) - 1 for budget in budgets]
    assert max(widest) == max(slots) + chunk
    token = 2 * 2 * 8 * 8  # k and v of 2 heads of 8 numbers
    per_slot, per_row = token + 8 + 8, 8 + (3 * 8 if "kv_threshold" in how else 0)  # F, position; books
    held = sum(n * per_slot + per_row for n in slots)
    stats = chunked.past_key_values.stats
    assert chunked.past_key_values.nbytes == held
    assert held < stats.peak_bytes <= held + 2 * chunk * token
    assert whole.past_key_values.stats.peak_bytes == held + 2 * 61 * token


def test_statistics(model: HeedfulForCausalLM, prompt: Tensor, mask: Tensor):
    result = generate(model, prompt, attention_mask=mask, kv_budget=[4, 9])
    cache = result.past_key_values
    real = (14 + 9) + 2 * (NEW - 1)  # the last token is never read
    assert cache.stats.evictions == [real - 2 * 4, real - 2 * 9]
    assert cache.kept == [4, 9]
    assert cache.seen == 14 + NEW - 1
    assert cache.stats.tokens_per_second > 0
    assert cache.stats.peak_bytes > cache.nbytes
    full = generate(model, prompt).past_key_values
    assert (full.stats.evictions, full.stats.peak_bytes) == ([0, 0], full.nbytes)

    one = HeedfulCache(2, 5)
    with torch.no_grad():
        model(prompt, past_key_values=one)
    assert one.stats.tokens_per_second is None
    one.reset()
    assert (one.stats.evictions, one.stats.peak_bytes, one.stats.tokens_per_second) == ([0, 0], 0, None)
    with torch.no_grad():
        model(prompt[:1], past_key_values=one)  # as if it were new, with another batch
    assert one.stats.evictions == [9, 9]
    assert one.stats.tokens_per_second is None


def test_the_bound_comes_with_the_output(make_model: Make, prompt: Tensor):
    model = make_model("mha", "selective", init_logit_std=0.2)
    ids = prompt.repeat(1, 5)
    caches = [
        generate(model, ids, kv_threshold=4.0, max_new_tokens=2, **more).past_key_values
        for more in ({}, {"prefill_chunk_size": 9}, {"kv_budget": 20})
    ]
    free, chunked, tight = (torch.stack(cache.forgotten) for cache in caches)
    assert free.shape == (2, 2)  # layers, rows
    torch.testing.assert_close(chunked, free)
    assert ((free >= 0) & (free <= 1)).all()
    assert ((tight >= free) & (tight <= 1)).all()
    with pytest.raises(ValueError, match="kept with a threshold"):
        _ = generate(model, ids, kv_budget=20, max_new_tokens=2).past_key_values.forgotten


def test_the_budgets_of_the_config(make_model: Make, prompt: Tensor):
    plain = make_model("gqa", "selective", tie_word_embeddings=False)
    model = make_model("gqa", "selective", tie_word_embeddings=False, eviction={"budget": [3, 6]})
    full, tight = (generate(plain, prompt, kv_budget=b).sequences for b in ("full", [3, 6]))
    assert not torch.equal(full, tight)
    own = HeedfulCache(2)
    taken = {
        "omitted": (generate(model, prompt), tight, [3, 6]),
        "full": (generate(model, prompt, kv_budget="full"), full, [25, 25]),
        "other": (generate(model, prompt, kv_budget=3), None, [3, 3]),
        "own cache": (generate(model, prompt, past_key_values=own), full, [25, 25]),
        "no cache": (generate(model, prompt, use_cache=False), full, None),
        "no cache in the config": (
            generate(model, prompt, generation_config=GenerationConfig(use_cache=False)),
            full,
            None,
        ),
        "with a policy": (
            generate(model, prompt, kv_policy="h2o"),
            generate(plain, prompt, kv_budget=[3, 6], kv_policy="h2o").sequences,
            [3, 6],
        ),
        "with a threshold": (
            generate(model, prompt, kv_threshold=0.7),
            generate(plain, prompt, kv_budget=[3, 6], kv_threshold=0.7).sequences,
            None,
        ),
    }
    for way, (result, sequences, kept) in taken.items():
        assert sequences is None or torch.equal(result.sequences, sequences), way
        assert kept is None or result.past_key_values.kept == kept, way
    assert own.seen == 25
    assert taken["no cache"][0].past_key_values is None
    torch.testing.assert_close(model.evaluate_nll(prompt), plain.evaluate_nll(prompt, kv_budget=[3, 6]))
    torch.testing.assert_close(model.evaluate_nll(prompt, kv_budget="full"), plain.evaluate_nll(prompt))


@pytest.mark.parametrize(
    "how",
    [HOW["budgets"], HOW["all"], HOW["streaming"], HOW["h2o"]],
    ids=["budgets", "all", "streaming", "h2o"],
)
def test_beams(model: HeedfulForCausalLM, prompt: Tensor, mask: Tensor, how: dict[str, Any]):
    """A beam scores what its text scores when it is read anew: rows were moved with all that belongs to them."""
    beams = {"num_beams": 4, "num_return_sequences": 3, "output_scores": True, "eos_token_id": None}
    result = generate(model, prompt, attention_mask=mask, **beams, **how)
    assert result.sequences.shape == (6, 14 + NEW)
    whole = torch.cat((mask.repeat_interleave(3, 0), torch.ones(6, NEW, dtype=torch.long)), dim=1)
    nll = model.evaluate_nll(result.sequences, whole, reduction="none", **how)
    torch.testing.assert_close(result.sequences_scores, -nll[:, 13:].sum(-1) / NEW, rtol=1e-5, atol=1e-5)
    alone = generate(model, prompt[1:, 5:], **beams, **how)
    assert torch.equal(alone.sequences, result.sequences[3:, 5:])
    assert len(set(map(tuple, result.sequences[:3].tolist()))) == 3


def test_many_samples_of_one_prompt(model: HeedfulForCausalLM, prompt: Tensor):
    drawn = []
    for ids, many in ((prompt, 3), (prompt.repeat_interleave(3, 0), 1)):
        torch.manual_seed(0)
        drawn.append(generate(model, ids, do_sample=True, num_return_sequences=many, kv_budget=5))
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    assert drawn[0].past_key_values.kept == [5, 5]
    again = model.evaluate_nll(drawn[0].sequences, kv_budget=5, reduction="none")
    assert again.shape == (6, 14 + NEW - 1)


def test_streamed_output(model: HeedfulForCausalLM, prompt: Tensor):
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    for more in ({}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}):
        streamer = Streamer()
        result = generate(model, prompt[:1], kv_budget=[3, 7], streamer=streamer, **more)
        assert streamer.tokens == result.sequences[0].tolist()
        assert streamer.ended
        assert torch.equal(result.sequences, generate(model, prompt[:1], kv_budget=[3, 7]).sequences)


def test_a_generous_budget_changes_nothing(model: HeedfulForCausalLM, prompt: Tensor, mask: Tensor):
    plain = generate(model, prompt, attention_mask=mask)
    for how in ({"kv_budget": 26}, {"kv_threshold": 1e6}, {"kv_budget": 25, "kv_policy": "tova"}):
        result = generate(model, prompt, attention_mask=mask, **how)
        assert torch.equal(result.sequences, plain.sequences)
        assert result.past_key_values.stats.evictions == [0, 0]


def test_a_cache_goes_on(model: HeedfulForCausalLM, prompt: Tensor):
    """A second call continues from a cache with a budget."""
    whole = generate(model, prompt, kv_budget=[3, 7])
    first = generate(model, prompt, kv_budget=[3, 7], max_new_tokens=5)
    second = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW - 5)
    assert torch.equal(second.sequences, whole.sequences)
    assert second.past_key_values.kept == [3, 7]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "budget of one": ({"kv_budget": 1}, ValueError, "budget must be a whole number >= 2"),
    "one of them": ({"kv_budget": [4, 1]}, ValueError, "budget must be a whole number >= 2"),
    "a fraction": ({"kv_budget": 2.5}, ValueError, 'kv_budget must be "full", a whole number or a list'),
    "a word": ({"kv_budget": "half"}, ValueError, 'kv_budget must be "full", a whole number or a list'),
    "too few": ({"kv_budget": [4]}, ValueError, r"one entry per layer \(2\), got 1"),
    "too many": ({"kv_budget": [4, 4, 4]}, ValueError, r"one entry per layer \(2\), got 3"),
    "policy": ({"kv_budget": 4, "kv_policy": "stream"}, ValueError, "did you mean 'streaming'"),
    "threshold of nothing": ({"kv_threshold": 0.0}, ValueError, "finite number greater than 0, got 0.0"),
    "threshold below": ({"kv_threshold": -1.0}, ValueError, "finite number greater than 0"),
    "threshold of all": ({"kv_threshold": float("inf")}, ValueError, "finite number greater than 0"),
    "threshold of another": (
        {"kv_budget": 4, "kv_threshold": 1.0, "kv_policy": "h2o"},
        ValueError,
        "needs the policy 'selective', got 'h2o'",
    ),
    "every none": (
        {"kv_budget": 4, "kv_evict_every": 0},
        ValueError,
        "evict_every must be a whole number >= 1",
    ),
    "every half": ({"kv_budget": 4, "kv_evict_every": 1.5}, ValueError, "evict_every must be a whole number"),
    "policy without": ({"kv_policy": "h2o"}, ValueError, "kv_policy='h2o' needs a budget or a threshold"),
    "every without": ({"kv_evict_every": 2}, ValueError, "evict_every=2 needs a budget or a threshold"),
    "every with all": (
        {"kv_budget": "full", "kv_evict_every": 2},
        ValueError,
        "evict_every=2 needs a budget or a threshold",
    ),
    "own cache": (
        {"kv_budget": 4, "past_key_values": HeedfulCache(2)},
        ValueError,
        "leave out past_key_values",
    ),
    "own cache, threshold": (
        {"kv_threshold": 4.0, "past_key_values": HeedfulCache(2)},
        ValueError,
        "leave out past_key_values",
    ),
    "no cache": ({"kv_budget": 4, "use_cache": False}, ValueError, "leave out past_key_values and"),
    "foreign cache": ({"past_key_values": DynamicCache()}, TypeError, r"must be a heedful\.hf\.HeedfulCache"),
    "foreign name": (
        {"kv_budget": 4, "cache_implementation": "static"},
        ValueError,
        "cache_implementation='static' is not supported",
    ),
    "deep cache": (
        {"past_key_values": HeedfulCache(3, 4)},
        ValueError,
        "the cache has 3 layers, the model 2",
    ),
}


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG.values(), ids=WRONG.keys())
def test_misuse(
    model: HeedfulForCausalLM, prompt: Tensor, wrong: dict[str, Any], kind: type[Exception], message: str
):
    with pytest.raises(kind, match=message):
        generate(model, prompt, **wrong)
    names = {"kv_budget", "kv_policy", "kv_threshold", "kv_evict_every"}
    if set(wrong) <= names:
        with pytest.raises(kind, match=message):
            model.evaluate_nll(prompt, **wrong)


def test_a_policy_must_go_with_every_layer(make_model: Make, prompt: Tensor):
    for score in ("softmax", ["selective", "softmax"]):
        model = make_model("mha", score)
        for how in ({"kv_budget": 4}, {"kv_threshold": 1.0}):
            with pytest.raises(
                ValueError, match="'selective' needs score 'selective', this layer has 'softmax'"
            ):
                generate(model, prompt, **how)
        assert generate(model, prompt, kv_budget=4, kv_policy="streaming").past_key_values.kept == [4, 4]


def test_only_caches_that_evict_have_slots(model: HeedfulForCausalLM, prompt: Tensor):
    """A threshold alone is enough to evict; "full" alone is not."""
    evicting = [
        [
            isinstance(memory, EvictingCache)
            for memory in generate(model, prompt, **how).past_key_values.memories
        ]
        for how in ({}, {"kv_budget": "full"}, {"kv_budget": "full", "kv_threshold": 1.0}, {"kv_budget": 4})
    ]
    assert evicting == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]

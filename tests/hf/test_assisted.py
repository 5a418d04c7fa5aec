"""Assisted decoding gives the tokens of plain decoding: what is drafted in vain is rolled back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.attention.eviction import EvictingCache
from heedful.hf import HeedfulCache, HeedfulForCausalLM

Make = Callable[..., HeedfulForCausalLM]
UNTIED = {"tie_word_embeddings": False}  # a tied model repeats itself
FORMS: dict[str, dict[str, Any]] = {
    "mha-softmax": {"attention": "mha", "score": "softmax", **UNTIED},
    "mha-selective": {"attention": "mha", "score": "selective", **UNTIED},
    "gqa-selective": {"attention": "gqa", "score": "selective", **UNTIED},
    "sas-selective": {"attention": "sas", "score": "selective", **UNTIED},
    "sas-compact": {
        "attention": "sas",
        "score": "selective",
        "attention_options": {"cache": "compact"},
        **UNTIED,
    },
}
CACHES: dict[str, dict[str, Any]] = {
    "full": {},
    "budget": {"kv_budget": 6},
    "budgets": {"kv_budget": [4, 9]},
    "every 3": {"kv_budget": [4, 6], "kv_evict_every": 3},
    "grace": {"kv_budget": 9, "kv_grace": 4, "kv_first": 2},
    "threshold": {"kv_threshold": 1.0},
    "streaming": {"kv_budget": 6, "kv_policy": "streaming"},
    "h2o": {"kv_budget": [4, 9], "kv_policy": "h2o"},
}
CASES = [("mha-selective", cache) for cache in CACHES]
CASES += [(form, cache) for form in ("gqa-selective", "sas-compact") for cache in ("full", "budgets", "h2o")]
CASES += [("sas-selective", "budget"), ("mha-softmax", "full"), ("mha-softmax", "streaming")]
CASES += [("mha-softmax", "h2o")]
NEW = 24


@pytest.fixture
def prompt() -> Tensor:
    """(1, 12) token ids that repeat themselves, so that the prompt is worth looking up."""
    ids = torch.randint(1, 50, (1, 4), generator=torch.Generator().manual_seed(2))
    return ids.repeat(1, 3)


def assistant_of(make_model: Make, form: dict[str, Any], **more: Any) -> HeedfulForCausalLM:
    """Nearly the same model: it is right at times."""
    assistant, generator = make_model(**form, **more), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    drafting = assistant.generation_config  # four tokens each time, however unsure
    drafting.num_assistant_tokens, drafting.num_assistant_tokens_schedule = 4, "constant"
    drafting.assistant_confidence_threshold = 0.0
    return assistant


def generate(model: HeedfulForCausalLM, ids: Tensor, **how: Any) -> Any:
    how = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **how}
    return model.generate(ids, **how)


class Watch:
    """Counts what was drafted and what was taken back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, main: HeedfulForCausalLM) -> None:
        self.read: list[int] = []  # by the model itself, not its assistant
        self.cropped: list[int] = []
        forward, crop = HeedfulForCausalLM.forward, HeedfulCache.crop

        def watched_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            out = forward(model, *args, **kwargs)
            if model is main:
                self.read.append(kwargs["input_ids"].shape[1])
            return out

        def watched_crop(cache: HeedfulCache, n: int) -> None:
            self.cropped.append(-n)
            crop(cache, n)
            assert all(not memory.recorded for memory in cache.memories)

        monkeypatch.setattr(HeedfulForCausalLM, "forward", watched_forward)
        monkeypatch.setattr(HeedfulCache, "crop", watched_crop)


def check(result: Any, plain: Any) -> None:
    assert torch.equal(result.sequences, plain.sequences)
    ours, theirs = result.past_key_values, plain.past_key_values
    assert ours.kept == theirs.kept
    # A draft accepted to its end leaves its last token unread, as plain decoding does.
    assert ours.seen == theirs.seen == result.sequences.shape[1] - 1
    assert ours.stats.evictions == theirs.stats.evictions
    for memory, other in zip(ours.memories, theirs.memories, strict=True):
        if isinstance(memory, EvictingCache):
            assert (
                memory.positions.sort().values.tolist()[0][-memory.kept :]
                == (other.positions.sort().values.tolist()[0][-memory.kept :])
            )
            assert memory.slots._journal is None


@pytest.mark.parametrize(("form", "cache"), CASES, ids=["-".join(case) for case in CASES])
def test_looking_up_the_prompt_changes_nothing(
    make_model: Make, prompt: Tensor, monkeypatch: pytest.MonkeyPatch, form: str, cache: str
):
    model = make_model(**{**FORMS[form], "tie_word_embeddings": True})  # worth looking up
    plain = generate(model, prompt, **CACHES[cache])
    watch = Watch(monkeypatch, model)
    check(generate(model, prompt, prompt_lookup_num_tokens=3, **CACHES[cache]), plain)
    assert len(watch.read) < NEW  # some drafts were right
    assert sum(watch.cropped) > 0  # and some in vain


@pytest.mark.parametrize(
    ("form", "cache"),
    # Every other case; the test above has them all, and the exhaustive tests have the rest here too.
    [
        pytest.param(*case, id="-".join(case), marks=[pytest.mark.exhaustive] * (i % 2))
        for i, case in enumerate(CASES)
    ],
)
def test_an_assistant_changes_nothing(
    make_model: Make, prompt: Tensor, monkeypatch: pytest.MonkeyPatch, form: str, cache: str
):
    model, assistant = make_model(**FORMS[form]), assistant_of(make_model, FORMS[form])
    plain = generate(model, prompt, **CACHES[cache])
    watch = Watch(monkeypatch, model)
    check(generate(model, prompt, assistant_model=assistant, **CACHES[cache]), plain)
    assert max(watch.read[1:]) == 5
    assert len(watch.read) < NEW
    assert sum(watch.cropped) > 0


@pytest.mark.parametrize("cache", ["full", "budgets", "h2o"])
def test_an_assistant_with_budgets_of_its_own(make_model: Make, prompt: Tensor, cache: str):
    """The assistant forgets and guesses worse; the tokens are the model's."""
    model = make_model(**FORMS["mha-selective"])
    assistant = assistant_of(make_model, FORMS["gqa-selective"], eviction={"budget": [3, 4]})
    plain = generate(model, prompt, **CACHES[cache])
    check(generate(model, prompt, assistant_model=assistant, **CACHES[cache]), plain)


def test_a_budget_of_the_config(make_model: Make, prompt: Tensor):
    model = make_model(**FORMS["mha-selective"], eviction={"budget": [4, 6]})
    plain = generate(model, prompt)
    assert plain.past_key_values.kept == [4, 6]
    check(generate(model, prompt, prompt_lookup_num_tokens=4), plain)


def test_padded_prompt(make_model: Make, prompt: Tensor):
    """Left padding and drafts: rows are ragged, and rolled back all the same."""
    model = make_model(**FORMS["sas-compact"])
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), prompt), dim=1)
    mask = (padded > 0).long()
    for cache in ("full", "budgets", "h2o"):
        plain = generate(model, prompt, **CACHES[cache]).sequences
        got = generate(model, padded, attention_mask=mask, prompt_lookup_num_tokens=3, **CACHES[cache])
        assert torch.equal(got.sequences[:, 3:], plain)


@pytest.mark.parametrize("cache", ["full", "budgets", "threshold"])
def test_sampling_with_one_outcome(make_model: Make, prompt: Tensor, cache: str):
    """Speculative sampling from a distribution of one token draws what greedy decoding takes."""
    model, assistant = make_model(**FORMS["mha-selective"]), assistant_of(make_model, FORMS["mha-selective"])
    plain = generate(model, prompt, **CACHES[cache])
    sampling = {"do_sample": True, "top_k": 1}
    check(generate(model, prompt, assistant_model=assistant, **sampling, **CACHES[cache]), plain)
    check(generate(model, prompt, prompt_lookup_num_tokens=3, **sampling, **CACHES[cache]), plain)


def test_sampling_repeats_with_the_seed(make_model: Make, prompt: Tensor):
    model, assistant = make_model(**FORMS["mha-selective"]), assistant_of(make_model, FORMS["mha-selective"])
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(
            generate(model, prompt, assistant_model=assistant, do_sample=True, kv_budget=5).sequences
        )
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("budget", [4, [3, 6]], ids=str)
def test_no_more_is_held_than_the_budget_and_a_draft(
    make_model: Make, prompt: Tensor, monkeypatch: pytest.MonkeyPatch, budget: Any
):
    """After the prompt: what is stored is the slots, and beside them only the piece being read."""
    model, draft = make_model(**FORMS["mha-selective"]), 3
    budgets = budget if isinstance(budget, list) else [budget] * 2
    pieces: list[int] = []
    pack = EvictingCache._pack

    def watched(cache: EvictingCache, memory: dict[str, Tensor], *rest: Any) -> None:
        pack(cache, memory, *rest)
        pieces.append(memory["k"].shape[2])
        assert cache.slots.tensors["k"].shape[2] == cache.rule.budget
        assert cache.kept <= (cache.rule.budget or 0)
        remembered = cache.recorded
        assert remembered == 0  # one piece at a time: the draft, noted when it has been read

    monkeypatch.setattr(EvictingCache, "_pack", watched)
    short = prompt[:, :3]
    result = generate(model, short, kv_budget=budget, prompt_lookup_num_tokens=draft, max_new_tokens=40)
    assert max(pieces) > 1
    assert max(pieces) <= 1 + draft + 2  # the prompt with its draft; later a token and its draft
    cache = result.past_key_values
    per_token = 2 * 32 * 8 + 8 + 8  # k, v, F, position
    stored = sum(b * per_token + 8 for b in budgets)
    assert cache.nbytes == stored
    # a piece is its keys and values beside the slots
    assert stored < cache.stats.peak_bytes <= stored + 2 * (1 + draft + 2) * 2 * 32 * 8


def test_the_cache_goes_on_after_assisted_decoding(make_model: Make, prompt: Tensor):
    model = make_model(**FORMS["mha-selective"])
    whole = generate(model, prompt, kv_budget=[4, 6])
    first = generate(model, prompt, kv_budget=[4, 6], prompt_lookup_num_tokens=3, max_new_tokens=10)
    second = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW - 10)
    check(second, whole)

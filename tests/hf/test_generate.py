"""`generate` with the cache gives what it gives without, in every mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from heedful.hf import HeedfulCache, HeedfulForCausalLM

Make = Callable[..., HeedfulForCausalLM]
MIXED: dict[str, Any] = {"attention": ["mha", "sas"], "score": ["selective", "softmax"]}
FORMS = [{"attention": a, "score": s} for a in ("mha", "mqa", "gqa", "sas") for s in ("softmax", "selective")]
FORMS += [{"attention": "sas", "score": "selective", "attention_options": {"cache": "compact"}}, MIXED]
NAMES = ["-".join(map(str, f.values())) for f in FORMS]
NAMES[-2:] = ["sas-selective-compact", "mixed"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "beam": {"do_sample": False, "num_beams": 3},
    "beams-returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "many": {"do_sample": True, "num_return_sequences": 3},
    "chunked": {"do_sample": False, "prefill_chunk_size": 3},
    "guided": {"do_sample": False, "guidance_scale": 1.5},
}


def generate(model: HeedfulForCausalLM, ids: Tensor, **how: Any) -> Tensor:
    torch.manual_seed(0)
    result: Any = model.generate(ids, max_new_tokens=8, **how)
    return result


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beam"])
def test_cache_changes_nothing(make_model: Make, ids: Tensor, form: dict[str, Any], mode: str):
    model = make_model(**form)
    cached = generate(model, ids, **MODES[mode])
    assert cached.shape == (2, 18)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **MODES[mode]))


@pytest.mark.parametrize("mode", ["beams-returned", "many", "chunked", "guided"])
def test_other_modes(make_model: Make, ids: Tensor, mode: str):
    model = make_model("sas", "selective")
    how = {k: v for k, v in MODES[mode].items() if k != "prefill_chunk_size"}
    assert torch.equal(generate(model, ids, **MODES[mode]), generate(model, ids, use_cache=False, **how))


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_left_padded_batch(make_model: Make, ids: Tensor, form: dict[str, Any], mode: str):
    """A padded row generates what it generates alone; with and without the cache."""
    model, how = make_model(**form), MODES[mode]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batch = ids.masked_fill(mask == 0, 0)
    padded = generate(model, batch, attention_mask=mask, **how)
    assert torch.equal(padded, generate(model, batch, attention_mask=mask, use_cache=False, **how))
    assert torch.equal(padded[:1, 4:], generate(model, ids[:1, 4:], **how))
    assert torch.equal(padded[1:], generate(model, ids[1:], **how))


@pytest.mark.parametrize("positions", ["learned", "none"])
def test_left_padded_batch_of_other_positions(make_model: Make, ids: Tensor, positions: str):
    model = make_model("mha", "selective", positions=positions)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = generate(model, ids, attention_mask=mask, do_sample=False)
    assert torch.equal(padded[:1, 4:], generate(model, ids[:1, 4:], do_sample=False))


def test_embeddings_as_prompt(make_model: Make, ids: Tensor):
    model = make_model("sas", "selective")
    new: Any = model.generate(inputs_embeds=model.embed_tokens(ids), max_new_tokens=8, do_sample=False)
    assert torch.equal(new, generate(model, ids, do_sample=False)[:, 10:])


def test_cache_that_goes_on(make_model: Make, ids: Tensor):
    """A second call continues from the cache of the first."""
    model = make_model("sas", "selective")
    whole = generate(model, ids, do_sample=False)
    first: Any = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, HeedfulCache)
    second: Any = model.generate(
        first.sequences, max_new_tokens=5, do_sample=False, past_key_values=first.past_key_values
    )
    assert torch.equal(second, whole)


def test_end_of_text_ends(make_model: Make, ids: Tensor):
    model = make_model()
    stop = int(generate(model, ids[:1], do_sample=False)[0, 12])
    ended: Any = model.generate(ids[:1], max_new_tokens=8, do_sample=False, eos_token_id=stop, pad_token_id=0)
    assert ended[0, -1] == stop
    assert 11 <= ended.shape[1] <= 13


@pytest.mark.parametrize(
    "implementation", ["static", "offloaded", "offloaded_static", "quantized", "sliding_window"]
)
def test_foreign_caches_by_name(make_model: Make, ids: Tensor, implementation: str):
    with pytest.raises(ValueError, match=f"cache_implementation='{implementation}' is not supported"):
        make_model().generate(ids, max_new_tokens=2, cache_implementation=implementation)


def test_paged_cache(make_model: Make, ids: Tensor):
    for call in (
        lambda: make_model().generate(ids, max_new_tokens=2, cache_implementation="paged"),
        lambda: make_model().generate_batch(ids.tolist(), max_new_tokens=2),
    ):
        with pytest.raises(
            NotImplementedError, match="continuous batching and paged caches are not supported"
        ):
            call()


def test_foreign_caches(make_model: Make, ids: Tensor):
    for foreign in (DynamicCache(), ((ids, ids),)):
        with pytest.raises(TypeError, match=r"past_key_values must be a heedful\.hf\.HeedfulCache, got"):
            make_model().generate(ids, max_new_tokens=2, past_key_values=foreign)


def test_attention_weights_are_never_kept(make_model: Make, ids: Tensor):
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        make_model().generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def test_packed_prompts_raise(make_model: Make, ids: Tensor):
    with pytest.raises(ValueError, match="leave out segment_ids"):
        make_model().generate(ids, max_new_tokens=3, segment_ids=torch.zeros_like(ids))

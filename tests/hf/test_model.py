"""`HeedfulForCausalLM.forward`: loss, masks, caches, dtypes, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, Trainer, TrainingArguments
from transformers.generation.continuous_batching import PagedAttentionCache

from heedful.hf import HeedfulCache, HeedfulConfig, HeedfulForCausalLM

Make = Callable[..., HeedfulForCausalLM]
FORMS = [(a, s) for a in ("mha", "sas") for s in ("softmax", "selective")]


def test_loss_is_shifted_cross_entropy(make_model: Make, ids: Tensor):
    model = make_model("sas", "selective")
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, -1] = -100
    out = model(ids, labels=labels)
    flat, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = F.cross_entropy(flat.float(), targets, ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    counted = (targets != -100).sum()
    assert counted == 9 * 2 - 3 - 1
    in_parts = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(in_parts, expected * counted / 100)


def test_embeddings_instead_of_ids(make_model: Make, ids: Tensor):
    model = make_model()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds, one of them"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds, one of them"):
        model()


def test_logits_to_keep(make_model: Make, ids: Tensor):
    model = make_model()
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    chosen = torch.tensor([1, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, full[:, chosen])


def test_hidden_states(make_model: Make, ids: Tensor):
    model = make_model()
    assert model(ids).hidden_states is None
    states = model(ids, output_hidden_states=True).hidden_states
    assert [tuple(h.shape) for h in states] == [(2, 10, 32)] * 3
    torch.testing.assert_close(states[0], model.embed_tokens(ids))
    torch.testing.assert_close(model.lm_head(states[-1]), model(ids).logits)


@pytest.mark.parametrize(("attention", "score"), FORMS)
def test_cache_equals_full(make_model: Make, ids: Tensor, attention: str, score: str):
    model = make_model(attention, score)
    with torch.no_grad():
        full = model(ids)
        assert isinstance(full.past_key_values, HeedfulCache)
        first = model(ids[:, :6])
        second = model(ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), full.logits)
    cache = second.past_key_values
    assert (cache.seen, cache.kept, cache.get_seq_length()) == (10, [10, 10], 10)
    assert cache.nbytes > 0


def test_cache_only_where_it_is_wanted(make_model: Make, ids: Tensor):
    model = make_model()
    assert model(ids).past_key_values is None  # gradients are on
    assert model(ids, use_cache=True).past_key_values.seen == 10
    with torch.no_grad():
        assert model(ids, use_cache=False).past_key_values is None
    uncached = make_model(use_cache=False)
    with torch.no_grad():
        assert uncached(ids).past_key_values is None


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
def test_left_padding_changes_nothing(make_model: Make, ids: Tensor, positions: str):
    model = make_model("sas", "selective", positions=positions)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, 4:], model(ids[:1, 4:]).logits)
    torch.testing.assert_close(padded[1:], model(ids[1:]).logits)


def test_packed_segments(make_model: Make, ids: Tensor):
    model = make_model("sas", "selective")
    segments = torch.tensor([[0] * 4 + [1] * 6] * 2)
    apart = torch.cat((model(ids[:, :4]).logits, model(ids[:, 4:]).logits), 1)
    torch.testing.assert_close(model(ids, segment_ids=segments).logits, apart)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # renamed in 5.23
def test_gradient_checkpointing_changes_nothing(make_model: Make, ids: Tensor):
    model = make_model("sas", "selective").train()
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert model.is_gradient_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize(("attention", "score"), FORMS)
def test_bf16_runs(make_model: Make, ids: Tensor, attention: str, score: str):
    model = make_model(attention, score)
    exact = model(ids).logits
    out = model.bfloat16()(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    assert (out.logits.double() - exact).abs().max() < 0.1 * exact.abs().max()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 13)


def test_resized_embeddings_stay_tied(make_model: Make, ids: Tensor):
    model = make_model()
    before = model(ids).logits
    model.resize_token_embeddings(60, mean_resizing=False)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.config.vocab_size == 60
    torch.testing.assert_close(model(ids).logits[..., :50], before)


def test_trainer_keeps_the_columns(make_config: Callable[..., Any], tmp_path: Path, ids: Tensor):
    """Trainer drops the columns that forward does not name."""
    rows = {"input_ids": ids.tolist() * 4, "labels": ids.tolist() * 4, "note": ["x"] * 8}
    rows["segment_ids"] = [[0] * 5 + [1] * 5] * 8
    torch.manual_seed(0)
    model = HeedfulForCausalLM(make_config("sas", "selective"))
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", disable_tqdm=True, learning_rate=0.01
    )
    trainer = Trainer(model, args, train_dataset=Dataset.from_dict(rows))
    batch = next(iter(trainer.get_train_dataloader()))
    assert {"input_ids", "labels", "segment_ids"} <= set(batch)
    assert "note" not in batch
    start = model.embed_tokens.weight.clone()
    assert trainer.train().global_step == 2
    assert not torch.equal(start, model.embed_tokens.weight)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "paged-cache": (
        {"cache": PagedAttentionCache.__new__(PagedAttentionCache)},
        TypeError,
        "must be a heedful.hf.HeedfulCache, got PagedAttentionCache.*paged",
    ),
    "two-caches": (
        {"cache": HeedfulCache(2), "past_key_values": HeedfulCache(2)},
        ValueError,
        "give the cache once",
    ),
    "typo": ({"attention_maks": 1}, TypeError, r"unknown arguments \['attention_maks'\]"),
    "weights": ({"output_attentions": True}, ValueError, "output_attentions is not supported"),
    "dynamic-cache": (
        {"past_key_values": DynamicCache()},
        TypeError,
        "must be a heedful.hf.HeedfulCache, got Dyn",
    ),
    "tuple-cache": ({"past_key_values": ()}, TypeError, "must be a heedful.hf.HeedfulCache, got tuple"),
    "deep-cache": ({"past_key_values": HeedfulCache(3)}, ValueError, "the cache has 3 layers, the model 2"),
    "short-mask": (
        {"attention_mask": torch.ones(2, 7)},
        ValueError,
        r"must cover cached and new tokens, shape \(2, 10\), got \(2, 7\)",
    ),
    "4d-mask": ({"attention_mask": torch.ones(2, 1, 10, 10)}, ValueError, "must cover cached and new tokens"),
    "segments": (
        {"segment_ids": torch.zeros(2, 3, dtype=torch.long)},
        ValueError,
        "segment_ids must have shape",
    ),
}


@pytest.mark.parametrize(("wrong", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(make_model: Make, ids: Tensor, wrong: dict[str, Any], kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        make_model()(ids, **wrong)


def test_mask_must_cover_the_cache(make_model: Make, ids: Tensor):
    model = make_model()
    with torch.no_grad():
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match=r"shape \(2, 11\), got \(2, 1\)"):
            model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1))
        with pytest.raises(ValueError, match="holds 2 sequences but got 1 new ones"):
            model(ids[:1, :1], past_key_values=cache)


def test_a_heedful_cache_is_only_for_heedful(ids: Tensor):
    with pytest.raises(TypeError, match="filled by heedful's attention"):
        HeedfulCache(1).update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)


def test_positions_that_start_over_mark_packed_documents():
    torch.manual_seed(0)
    config = HeedfulConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = HeedfulForCausalLM(config).eval()
    ids = torch.randint(0, 20, (1, 9))
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])).logits
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]).logits)
    torch.testing.assert_close(packed[:, :4], model(ids[:, :4]).logits)


def test_return_dict_false_gives_a_tuple():
    config = HeedfulConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = HeedfulForCausalLM(config).eval()
    ids = torch.randint(0, 20, (1, 5))
    (logits,) = model(ids, use_cache=False, return_dict=False)
    torch.testing.assert_close(logits, model(ids).logits)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 2


def test_kv_budget_bounds_the_cache_and_evaluates_exactly():
    torch.manual_seed(0)
    config = HeedfulConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        score="selective",
        init_logit_std=2.0,
    )
    model = HeedfulForCausalLM(config).double().eval()
    ids, mask = torch.randint(0, 40, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[1, :6] = 0
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, kv_budget=[6, 4], return_dict_in_generate=True
    )
    assert (out.past_key_values.kept, out.past_key_values.seen) == ([6, 4], 49)
    chunked = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, kv_budget=[6, 4], prefill_chunk_size=7
    )
    assert torch.equal(chunked, out.sequences)

    nll = model.evaluate_nll(ids, mask, kv_budget=[6, 4], reduction="none")
    cache, steps = HeedfulCache(2, [6, 4]), []
    with torch.no_grad():
        for t in range(29):
            steps.append(
                model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
            )
    stepwise = torch.nn.functional.cross_entropy(
        torch.cat(steps, 1).float().transpose(1, 2), ids[:, 1:], reduction="none"
    )
    counted = (mask[:, 1:] * mask[:, :-1]).bool()
    torch.testing.assert_close(nll[counted], stepwise[counted])
    mean = model.evaluate_nll(ids, mask, kv_budget=[6, 4])
    torch.testing.assert_close(mean, nll[counted].mean())
    assert model.evaluate_nll(ids, mask, kv_budget=[6, 4]) != model.evaluate_nll(ids, mask)


@pytest.mark.parametrize("budget", [1, [4], [4, "x"], "foo", 2.5])
def test_an_unsound_kv_budget_is_refused(budget):
    config = HeedfulConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, score="selective"
    )
    with pytest.raises(ValueError, match="budget"):
        HeedfulForCausalLM(config).generate(torch.zeros(1, 3, dtype=torch.long), kv_budget=budget)

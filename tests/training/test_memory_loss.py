"""The memory loss in the model and in training: what is added, when, and that batching does not matter."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, default_data_collator

from heedful.data import TokenDataset
from heedful.evaluation import evaluate
from heedful.hf import HeedfulConfig, HeedfulForCausalLM
from heedful.hf.load import load_model
from heedful.training import RunResult, TrainSettings
from heedful.training.run import LanguageModelTrainer, load_settings_data, memory_logs

Settings = Callable[..., TrainSettings]
Train = Callable[..., RunResult]
LENGTH = 11


def model_of(memory_loss: float = 0.1, tau: float = 1.0, **more: Any) -> HeedfulForCausalLM:
    """Two layers in float64, in training mode."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "init_logit_std": 1.0,
        "score": "selective",
        "score_options": {"memory_loss": memory_loss, "memory_tau": tau},
    }
    return HeedfulForCausalLM(HeedfulConfig(**{**small, **more})).double().train()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 30, (8, LENGTH), generator=torch.Generator().manual_seed(1))


def gradients(model: HeedfulForCausalLM) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def expected_share(model: HeedfulForCausalLM, ids: Tensor, real: Tensor, tau: float) -> list[list[float]]:
    """`max_i M_i / n` of every layer and row: each row alone, from the layer's own queries and keys."""
    shares: list[list[float]] = [[] for _ in model.layers]
    for row, mask in zip(ids, real, strict=True):
        kept = row[mask]
        states = model(kept[None], output_hidden_states=True).hidden_states
        for n, layer in enumerate(model.layers):
            attention = layer.attention
            positions = torch.arange(len(kept))[None]
            q, memory = attention.project(layer.attention_norm(states[n]), positions)
            k, _ = attention.keys_values(memory)
            logits = (q[0, 0] @ k[0, 0].T / math.sqrt(q.shape[-1])).tolist()
            soft_mask, most = [0.0] * len(kept), 0.0
            for i in range(len(kept)):
                most = max(most, (i + 1) - sum(min(soft_mask[j], tau) / tau for j in range(i + 1)))
                for j in range(1, i):
                    soft_mask[j] += max(logits[i][j], 0.0)
            shares[n].append(most / len(kept))
    return shares


@pytest.mark.parametrize(("weight", "tau"), [(0.1, 1.0), (2.5, 0.5)])
@pytest.mark.parametrize("attention", ["mha", "sas"])
def test_the_loss_is_nll_and_the_formula(ids: Tensor, attention: str, weight: float, tau: float):
    model = model_of(weight, tau, attention=attention)
    out = model(ids, labels=ids)
    nll = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    shares = torch.tensor(expected_share(model, ids, torch.ones_like(ids).bool(), tau), dtype=torch.float64)
    torch.testing.assert_close(out.memory_loss, weight * shares.mean())
    torch.testing.assert_close(out.loss.double(), nll + weight * shares.mean(), rtol=1e-6, atol=1e-6)
    assert not out.memory_loss.requires_grad
    assert len(out.kept_tokens) == 2
    for kept, own in zip(out.kept_tokens, shares, strict=True):
        assert not kept.requires_grad
        torch.testing.assert_close(kept.amax(-1) / LENGTH, own)
    assert (shares < 1).any()  # somebody was voted away


def test_padding_counts_for_nothing(ids: Tensor):
    model, mask = model_of(), torch.ones_like(ids)
    mask[1, :4], mask[2, 7:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 4] = -100  # what padding would predict
    out = model(ids, attention_mask=mask, labels=labels)
    shares = torch.tensor(expected_share(model, ids, mask.bool(), 1.0), dtype=torch.float64)
    torch.testing.assert_close(out.memory_loss, 0.1 * shares.mean())
    for kept in out.kept_tokens:
        assert not kept[mask == 0].any()
    before = gradients_of(model, ids, mask, labels)
    other = ids.clone()
    other[mask == 0] = 3
    for ours, theirs in zip(gradients_of(model, other, mask, labels), before, strict=True):
        torch.testing.assert_close(ours, theirs)


def gradients_of(model: HeedfulForCausalLM, ids: Tensor, mask: Tensor, labels: Tensor) -> list[Tensor]:
    """Without the embedding, which knows of ids that do not matter."""
    model.zero_grad()
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    return [p.grad.clone() for n, p in model.named_parameters() if "embed" not in n]


def test_packed_documents_count_by_their_length(ids: Tensor):
    model = model_of()
    segments = torch.tensor([[0] * 4 + [1] * 7]).expand(8, -1)
    packed = model(ids, labels=ids, segment_ids=segments).memory_loss
    parts = [(4, model(ids[:, :4], labels=ids[:, :4])), (7, model(ids[:, 4:], labels=ids[:, 4:]))]
    torch.testing.assert_close(packed, sum(n * out.memory_loss for n, out in parts) / LENGTH)


def test_only_where_it_is_trained(ids: Tensor):
    model = model_of()
    with_it = model(ids, labels=ids)
    assert with_it.memory_loss > 0
    assert model(ids).memory_loss is None  # no labels, no loss
    model.eval()
    plain = model(ids, labels=ids)
    assert (plain.memory_loss, plain.kept_tokens) == (None, None)
    torch.testing.assert_close(with_it.loss - with_it.memory_loss, plain.loss.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model_of(0.0)(ids, labels=ids).loss, plain.loss)
    softmax = model_of(score="softmax", score_options={})(ids, labels=ids)
    assert (softmax.memory_loss, softmax.kept_tokens) == (None, None)


def test_layers_without_it_count_as_nothing(ids: Tensor):
    """Half the layers train it: the mean is over all layers, so that a layer's weight is the same."""
    both = model_of()
    half = model_of(score=["selective", "softmax"], score_options=[{"memory_loss": 0.1}, {}])
    half.load_state_dict(both.state_dict())
    out = half(ids, labels=ids)
    assert len(out.kept_tokens) == 1
    shares = expected_share(both, ids, torch.ones_like(ids).bool(), 1.0)  # the first layer is the same
    torch.testing.assert_close(out.memory_loss.item(), 0.1 * sum(shares[0]) / 8 / 2)


def test_gradients_are_those_of_the_formula(ids: Tensor):
    """Against differences: F is not detached, and the clamp and the maximum pass gradients on."""
    model = model_of(3.0)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.q_norm.weight.mul_(0.5)
    gain = model.layers[0].attention.q_norm.weight
    out = model(ids, labels=ids)
    (whole,) = torch.autograd.grad(out.loss, gain)
    model.eval()
    (nll,) = torch.autograd.grad(model(ids, labels=ids).loss, gain)
    model.train()
    own, step = torch.zeros_like(gain), 1e-6
    for i in range(len(gain)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                gain[i] += sign * step
                values.append(model(ids, labels=ids, use_cache=False).memory_loss)
                gain[i] -= sign * step
        own[i] = (values[0] - values[1]) / (2 * step)
    assert own.abs().max() > 1e-3
    torch.testing.assert_close(whole - nll, own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_batch(ids: Tensor, parts: int):
    model = model_of(1.0)
    items = torch.tensor(8 * (LENGTH - 1))
    found = []
    for pieces in (1, parts):
        model.zero_grad()
        for piece in ids.chunk(pieces):
            model(piece, labels=piece, num_items_in_batch=items).loss.backward()
        found.append(gradients(model))
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for whole, summed, plain in zip(*found, gradients(model), strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(whole, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trainer_class", [Trainer, LanguageModelTrainer])
def test_a_step_does_not_depend_on_accumulation(ids: Tensor, tmp_path: Path, trainer_class: type[Trainer]):
    """8 rows at once, or 2 at a time four times: the same weights after a step."""
    after, logs = [], []
    for rows, times in ((8, 1), (2, 4)):
        model = model_of(5.0).float()
        args = TrainingArguments(
            str(tmp_path / str(rows)),
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=times,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        data = TokenDataset({"input_ids": ids, "labels": ids})
        trainer = trainer_class(model, args, train_dataset=data, data_collator=default_data_collator)
        trainer.train()
        after.append({name: p.detach() for name, p in model.named_parameters()})
        logs.append(trainer.state.log_history[0])
    start = model_of(5.0).float().state_dict()
    moved = max((after[0][name] - start[name]).abs().max() for name in after[0])
    assert moved > 1e-2
    for name in after[0]:
        torch.testing.assert_close(after[1][name], after[0][name], rtol=1e-4, atol=1e-5)
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)
    assert logs[0]["loss"] > math.log(30) * 0.9 + 1  # with the memory loss in it
    assert ("memory_loss" in logs[0]) == (trainer_class is LanguageModelTrainer)


def test_gradient_checkpointing(ids: Tensor):
    model, found = model_of(1.0), []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        out = model(ids, labels=ids)
        assert len(out.kept_tokens) == 2
        out.loss.backward()
        found.append((out.memory_loss, gradients(model)))
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(found[0][0], found[1][0])
    for plain, checkpointed in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad.*")
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
def test_reentrant_checkpointing_is_refused(ids: Tensor):
    """It would train without the memory loss, unsaid."""
    model = model_of()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"use gradient_checkpointing_kwargs=.+False"):
        model(ids, labels=ids).loss.backward()


def test_the_log(settings: Settings, quiet_train: Train, tmp_path: Path):
    options = {"memory_loss": 0.5, "memory_tau": 0.5}
    s = settings(score="selective", score_options=options, n_layers=2, steps=8, init_logit_std=1.0)
    result = quiet_train(s, tmp_path / "run")
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    assert len(steps) == 8
    for entry in steps:
        assert 0 < entry["memory_loss"] < 0.5
        assert entry["memory_loss"] < entry["loss"]
        for layer in range(2):
            assert 1 <= entry[f"kept_mean_{layer}"] <= entry[f"kept_p95_{layer}"] <= 32
        assert "kept_mean_2" not in entry
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    assert len(evaluations) == 4
    assert not any("memory_loss" in entry for entry in evaluations)

    # The validation loss is the nll, in the curve and at the end.
    model, data = load_model(tmp_path / "run"), load_settings_data(s)
    assert model.config.score_options == options
    assert evaluate(model, data.validation).loss == pytest.approx(result.val_loss, abs=1e-5)
    batch = {name: t[:4] for name, t in data.validation.tensors.items()}
    logits = model.eval()(input_ids=batch["input_ids"]).logits[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    rows = TokenDataset(batch)
    assert evaluate(model.train(), rows).loss == pytest.approx(nll.item(), abs=1e-5)


def test_training_for_it_keeps_less(settings: Settings, quiet_train: Train, tmp_path: Path):
    kept = []
    for weight in (1e-6, 5.0):
        options = {"memory_loss": weight}
        s = settings(score="selective", score_options=options, steps=32)
        quiet_train(s, tmp_path / str(weight))
        lines = (tmp_path / str(weight) / "log.jsonl").read_text().splitlines()
        kept.append([e["kept_mean_0"] for e in map(json.loads, lines) if "loss" in e])
    assert kept[1][-1] < 0.8 * kept[0][-1]


def test_no_log_without_it(settings: Settings, quiet_train: Train, tmp_path: Path):
    quiet_train(settings(score="selective", steps=2), tmp_path / "run")
    assert "memory_loss" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_logs_by_hand(ids: Tensor):
    model, mask = model_of(), torch.ones_like(ids)
    mask[0, :6] = 0
    out = model(ids, attention_mask=mask, labels=ids)
    logs = memory_logs(out, mask)
    assert logs["memory_loss"] == pytest.approx(out.memory_loss.item())
    for layer, kept in enumerate(out.kept_tokens):
        real = sorted(kept[mask.bool()].tolist())
        assert len(real) == 8 * LENGTH - 6
        assert logs[f"kept_mean_{layer}"] == pytest.approx(sum(real) / len(real))
        assert logs[f"kept_p95_{layer}"] == pytest.approx(real[round(0.95 * len(real)) - 1])


def test_the_trainer_holds_on_to_no_logits(ids: Tensor, tmp_path: Path):
    """What the log needs is small; logits of a whole batch would be held beside those of the next."""
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = LanguageModelTrainer(model_of(), args)
    loss = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids})
    assert loss.requires_grad
    held = [t for t in trainer._last.values() if isinstance(t, Tensor)]
    assert not any(t.requires_grad for t in held)
    assert trainer._last.logits is None
    logs: dict[str, float] = {"loss": 1.0}
    trainer.log(logs)
    assert logs["memory_loss"] > 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"memory_loss": -0.1}, r"memory_loss must be a finite number, 0 or more, got -0\.1"),
    "endless": ({"memory_loss": math.inf}, "memory_loss must be a finite number, 0 or more, got inf"),
    "no number": ({"memory_loss": math.nan}, "memory_loss must be a finite number, 0 or more, got nan"),
    "text": ({"memory_loss": "0.1"}, "memory_loss must be a finite number, 0 or more, got '0.1'"),
    "yes": ({"memory_loss": True}, "memory_loss must be a finite number, 0 or more, got True"),
    "tau of nothing": ({"memory_tau": 0.0}, r"memory_tau must be a finite number, greater than 0, got 0\.0"),
    "tau below": ({"memory_tau": -1}, "memory_tau must be a finite number, greater than 0, got -1"),
    "endless tau": ({"memory_tau": math.inf}, "memory_tau must be a finite number, greater than 0, got inf"),
    "typo": ({"memory_lost": 0.1}, "memory_loss"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_refused(settings: Settings, wrong: dict[str, Any], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        settings(score="selective", score_options=wrong)
    with pytest.raises((ValueError, TypeError), match=message):
        HeedfulConfig(score="selective", score_options=wrong)


def test_softmax_has_none(settings: Settings):
    with pytest.raises((ValueError, TypeError), match="memory_loss"):
        settings(score="softmax", score_options={"memory_loss": 0.1})


def test_rows_of_unequal_length_accumulate_to_the_same():
    from heedful.hf import HeedfulConfig, HeedfulForCausalLM

    torch.manual_seed(0)
    config = HeedfulConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        score="selective",
        score_options={"memory_loss": 5.0},
        init_logit_std=2.0,
    )
    model = HeedfulForCausalLM(config).double().train()
    ids = torch.randint(0, 20, (4, 12))
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[1, 9:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    items = (labels[:, 1:] != -100).sum()
    whole = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).memory_loss
    for cut in (1, 2, 3):
        parts = [
            model(ids[p], attention_mask=mask[p], labels=labels[p], num_items_in_batch=items).memory_loss
            for p in (slice(0, cut), slice(cut, None))
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_a_cache_is_refused_where_the_memory_loss_is_trained():
    from heedful.hf import HeedfulConfig, HeedfulForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = HeedfulForCausalLM(HeedfulConfig(**sizes, score="selective", score_options={"memory_loss": 0.1}))
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="memory loss cannot be computed with a cache"):
        model.train()(ids, labels=ids, use_cache=True)
    with torch.no_grad():
        assert model(ids, labels=ids).memory_loss is not None

"""Validation loss: every labelled token counts once, however the rows fall into batches."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heedful.data import TokenDataset
from heedful.evaluation import Evaluation, evaluate
from heedful.hf import HeedfulConfig, HeedfulForCausalLM


def rows(n: int = 7, length: int = 9) -> TokenDataset:
    """Rows with few labels in some and many in others, in two segments each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (n, length), generator=generator)
    labels = ids.masked_fill(torch.rand((n, length), generator=generator) < 0.4, -100)
    labels[0] = -100
    labels[1] = ids[1]
    segments = (torch.arange(length) >= 4).long().expand(n, length)
    return TokenDataset({"input_ids": ids, "labels": labels, "segment_ids": segments})


@pytest.fixture
def model() -> HeedfulForCausalLM:
    torch.manual_seed(0)
    return HeedfulForCausalLM(
        HeedfulConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, score="selective"
        )
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_mean_over_tokens(model: HeedfulForCausalLM, batch_size: int):
    data = rows()
    tensors = data.tensors
    with torch.no_grad():
        logits = model.eval()(tensors["input_ids"], segment_ids=tensors["segment_ids"]).logits
    targets = tensors["labels"][:, 1:]
    counted = targets != -100
    expected = F.cross_entropy(logits[:, :-1][counted], targets[counted]).item()
    right = (logits[:, :-1].argmax(-1) == targets)[counted].float().mean().item()
    result = evaluate(model, data, batch_size=batch_size)
    assert result.tokens == counted.sum()
    assert result.loss == pytest.approx(expected, abs=1e-6)
    assert result.accuracy == pytest.approx(right)


def test_the_mode_of_the_model_is_kept(model: HeedfulForCausalLM):
    for training in (True, False):
        model.train(training)
        evaluate(model, rows())
        assert model.training == training


def test_evaluates_in_evaluation_mode():
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.modes: list[Any] = []

        def forward(self, input_ids: Tensor, segment_ids: Tensor, use_cache: bool) -> Any:
            self.modes.append((self.training, torch.is_grad_enabled(), use_cache))
            return SimpleNamespace(logits=F.one_hot(input_ids, 20).float())

    seen = Seen().train()
    evaluate(seen, rows())
    assert seen.modes == [(False, False, False)]


def test_bits_per_byte():
    uniform = Evaluation(loss=math.log(256), tokens=100, accuracy=0.0)
    assert uniform.bits_per_byte(100) == pytest.approx(8.0)  # one byte per token, nothing known
    assert uniform.bits_per_byte(400) == pytest.approx(2.0)  # the same loss on tokens of four bytes


def test_nothing_labelled(model: HeedfulForCausalLM):
    data = rows()
    data.tensors["labels"] = torch.full_like(data.tensors["labels"], -100)
    with pytest.raises(ValueError, match="no token is labelled, so there is nothing to measure"):
        evaluate(model, data)

"""Small Hugging Face models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from heedful.hf import HeedfulConfig, HeedfulForCausalLM

VOCAB = 50


@pytest.fixture
def make_config() -> Callable[..., HeedfulConfig]:
    """A config by form; logits start large enough for everything to matter."""

    def make(attention: Any = "mha", score: Any = "softmax", **more: Any) -> HeedfulConfig:
        small: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "init_logit_std": 1.0,
        }
        if attention == "gqa":
            small["num_key_value_heads"] = 2
        return HeedfulConfig(**{**small, "attention": attention, "score": score, **more})

    return make


@pytest.fixture
def make_model(make_config: Callable[..., HeedfulConfig]) -> Callable[..., HeedfulForCausalLM]:
    """A model in evaluation mode, in float64: two ways of computing never pick different tokens."""

    def make(*args: Any, **more: Any) -> HeedfulForCausalLM:
        torch.manual_seed(0)
        return HeedfulForCausalLM(make_config(*args, **more)).double().eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 10) token ids, none of which is 0, which the tests pad with."""
    return torch.randint(1, VOCAB, (2, 10), generator=torch.Generator().manual_seed(1))

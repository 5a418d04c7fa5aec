"""Small random models of every family that can be converted, saved as transformers saves them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
GEMMA = {"sliding_window": 6, "query_pre_attn_scalar": 8}
SPECS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"rope_parameters": YARN},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "olmo2": {"rope_parameters": LINEAR},
    "phi3": {"partial_rotary_factor": 0.5},
    "gpt2": {},
    "gpt_neox": {},
}
"""Family -> what its config has beside `COMMON`: scaled and partial rotation, windows, caps, biases, experts."""


def config_of(family: str, **more: Any) -> Any:
    values = {**COMMON, **SPECS[family], **more}
    if family == "gpt2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        values = {names.get(k, k): v for k, v in values.items() if k not in ("intermediate_size", "head_dim")}
        values["n_positions"] = values.pop("max_position_embeddings")
    if family in ("gpt2", "gpt_neox"):
        del values["num_key_value_heads"]
        values.pop("head_dim", None)
    return CONFIG_MAPPING[family](**values)


@pytest.fixture
def make_source() -> Callable[..., Any]:
    """A stock model in evaluation mode, whose weights are large enough for everything to matter."""

    def make(family: str, seed: int = 0, **more: Any) -> Any:
        config = config_of(family, **more)
        torch.manual_seed(seed)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture
def save_source(make_source: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """The folder of one."""

    def save(family: str, folder: str = "source", shard: str = "5GB", **more: Any) -> Path:
        make_source(family, **more).save_pretrained(tmp_path / folder, max_shard_size=shard)
        return tmp_path / folder

    return save


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))

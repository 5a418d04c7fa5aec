"""LoRA on the attention projections of a converted model, by PEFT."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from heedful.adaptation.learning import learning_layers


def with_lora(model: Any, rank: int) -> Any:
    """The model with adapters on q, k, v and o of every layer that selects, all else frozen.

    Raises:
        ImportError: if PEFT is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError('--lora needs peft: pip install "heedful[adapt]"') from None
    names = projections(model)
    first = model.get_submodule(names[0])
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=names,
        fan_in_fan_out=isinstance(first, Conv1D),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def projections(model: nn.Module) -> list[str]:
    """The full names of the linear maps of the attention modules that select, those of their scores left out."""
    return [
        f"{place}.{name}"
        for place, module in model.named_modules()
        if any(module is layer for layer in learning_layers(model))
        for name, part in module.named_children()
        if isinstance(part, nn.Linear | Conv1D)
    ]

"""Weights between `heedful.Decoder`, which needs torch only, and the Hugging Face model.

A name of the decoder is `model.` and that name in the Hugging Face model, but for `lm_head.weight`, which
both call so.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch

from heedful.decoder import Decoder
from heedful.hf.configuration import HeedfulConfig
from heedful.hf.modeling import PREFIX, HeedfulForCausalLM, hugging_face_name

T = TypeVar("T")


def hugging_face_names(weights: Mapping[str, T]) -> dict[str, T]:
    """Weights of a `Decoder` under the names of `HeedfulForCausalLM`."""
    return {hugging_face_name(name): weight for name, weight in weights.items()}


def decoder_names(weights: Mapping[str, T]) -> dict[str, T]:
    """Weights of a `HeedfulForCausalLM` under the names of `Decoder`."""
    return {name.removeprefix(PREFIX): weight for name, weight in weights.items()}


def to_decoder(model: HeedfulForCausalLM) -> Decoder:
    """A `Decoder` with a copy of the model's weights, in its dtype and on its device."""
    decoder = Decoder(model.config.to_decoder_config()).to(device=model.device, dtype=model.dtype)
    decoder.load_state_dict(decoder_names(model.state_dict()))
    return decoder.train(model.training)


def from_decoder(decoder: Decoder) -> HeedfulForCausalLM:
    """A `HeedfulForCausalLM` with a copy of the decoder's weights, in its dtype and on its device."""
    weight = decoder.embed_tokens.weight
    model = HeedfulForCausalLM(HeedfulConfig.from_decoder_config(decoder.config))
    torch.nn.Module.to(model, device=weight.device, dtype=weight.dtype)
    model.load_state_dict(hugging_face_names(decoder.state_dict()))
    return model.train(decoder.training)

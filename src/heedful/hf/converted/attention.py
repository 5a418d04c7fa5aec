"""Converted attention: the source's own projections, norms and rotation; what happens to q, k and v is heedful's.

Every family of transformers ends its attention in a call of a registered function. Ours is registered under one
name, and the modules of a converted model tell it, by an argument of their own, what it has to know: the layer's
input, for the selectors, and the cache.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from heedful.attention.score import Score
from heedful.attention.tokens import Tokens
from heedful.hf.cache import ConvertedCacheLayer, HeedfulCache
from heedful.hf.converted import window
from heedful.hf.converted.known import FAMILIES, source_module
from heedful.hf.converted.norms import largest_norm
from heedful.hf.converted.sas import Rotation, SimulatedHeads
from heedful.hf.converted.softcap import capped_window
from heedful.hf.packing import segments_of_lengths
from heedful.ops.precision import wide_dtype

NAME = "heedful"
"""The name of the attention function in transformers' registry."""
_CACHE_NAMES = "cache", "past_key_values", "layer_past"


class Call(NamedTuple):
    """What a layer tells the attention function."""

    x: Tensor
    """(B, T, C), the layer's input."""
    cache: HeedfulCache | None
    rotation: Rotation


class ConvertedAttention(nn.Module):
    """What is added to an attention module of the source; see `converted_class`."""

    score: Score
    scaling: float
    layer_idx: int
    slides: bool
    """Whether the layer has a sliding window and keeps its own attention, as beside layers that have none."""
    window: int | None
    """The last tokens that a query sees in a layer whose attention is ours; None: all."""
    stretch: float
    """What its rotation multiplies lengths by."""
    rotates: bool
    """Whether the model has a rotation."""
    sas: SimulatedHeads | None
    """More heads than the source has; None: the source's own."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the source's; the attention function is told the layer's input and cache."""
        cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
        cache = cache or next((value for value in args if isinstance(value, Cache)), None)
        if cache is not None and not isinstance(cache, HeedfulCache):
            raise TypeError(
                f"a converted model needs a heedful.hf.HeedfulCache, got {type(cache).__name__}, which keeps keys "
                f"and values only; leave it out, or make one with model.new_cache(). Static, paged, offloaded and "
                f"quantized caches are not supported."
            )
        if cache is not None:
            layer: Any = cache.layers[self.layer_idx]
            layer.expected = True
        rotation = kwargs.get("position_embeddings") or next((a for a in args if isinstance(a, tuple)), None)
        if self.sas is not None and self.rotates and rotation is None:
            raise TypeError(
                "simulated heads need the rotation; give the layer position_embeddings=(cos, sin)"
            )
        call = Call(hidden_states, cache, rotation)
        return super().forward(hidden_states, *args, **kwargs, heedful=call)

    # What a cache asks of a layer.

    @property
    def scale(self) -> float:
        """Multiplies the logits."""
        return self.scaling

    def keys_values(self, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values, as they are remembered."""
        return memory["k"], memory["v"]

    def logit_sizes(self, q: Tensor, k: Tensor, real_q: Tensor, real_k: Tensor) -> Tensor:
        """(B, 2), the largest sizes of queries and keys; no logit exceeds their product.

        With QK-norm on each head they are at least what its gains allow, so that they hold for all others as well;
        not so where heads are simulated, which happens after the norm.
        """
        dtype, root = wide_dtype(q), self.scaling**0.5
        sizes = [
            x.to(dtype).norm(dim=-1).masked_fill(~real[:, None], 0.0).flatten(1).amax(-1) * root
            for x, real in ((q, real_q), (k, real_k))
        ]
        for i, name in enumerate(("q_norm", "k_norm") if self.sas is None else ()):
            allowed = largest_norm(getattr(self, name, None))
            if allowed is not None:
                sizes[i] = torch.maximum(sizes[i], allowed.to(dtype) * (self.stretch * root))
        return torch.stack(sizes, dim=-1)


@cache
def converted_class(source: type) -> Any:
    """The class of the source's attention module with `ConvertedAttention` in front."""
    return type(f"Heedful{source.__name__}", (ConvertedAttention, source), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """The class of that name, for pickle, which looks classes up in their module."""
    for family in FAMILIES if name.startswith("Heedful") and name.endswith("Attention") else ():
        source = getattr(source_module(family), name.removeprefix("Heedful"), None)
        if source is not None:
            return converted_class(source)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    heedful: Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q (B, H, T, D), k (B, G, T, D), v (B, G, T, E) of the new tokens -> (B, T, H, E).

    Raises:
        ValueError: for a module that is not converted, a mask that is not causal, dropout or `output_attentions`.
    """
    if not isinstance(module, ConvertedAttention) or heedful is None:
        raise ValueError(
            f"attn_implementation={NAME!r} is for converted models, this is a {type(module).__name__}; convert the "
            f"model (heedful.convert), or leave it out"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions is not supported: attention weights are never kept")
    if module.slides:
        if kwargs.get("softcap") is not None:
            return capped_window(query, key, value, attention_mask, module.scale, kwargs["softcap"]), None
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
        return out, None
    if dropout:
        raise ValueError(
            f"attention dropout ({dropout}) is not supported in a converted layer; set it to 0 in the config"
        )
    if kwargs.get("softcap") != getattr(module.score, "softcap", None):
        raise ValueError(
            f"the layer caps its logits at {kwargs['softcap']}, its score does not; convert it again"
        )
    batch, length = query.shape[0], query.shape[2]
    if module.window is None:
        key_mask, segment_ids = _masks(attention_mask, batch, length)
    else:
        key_mask, segment_ids = window.masks_of(attention_mask, batch, length, module.window)
    if segment_ids is None and kwargs.get("cu_seq_lens_q") is not None:
        lengths = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
        segment_ids = segments_of_lengths(*lengths, batch, length)
    if module.sas is not None:
        query, key, value = module.sas(query, key, value, heedful.rotation)
    tokens = Tokens.of(module, heedful.x, query, {"k": key, "v": value}, key_mask, segment_ids)
    if heedful.cache is None and module.window is not None:
        out = window.attend_alone(module, tokens, module.window)
    elif heedful.cache is None:
        out = tokens.attend_alone(module)
    else:
        held = heedful.cache.layers[module.layer_idx]
        assert isinstance(held, ConvertedCacheLayer)
        out = held.memory.attend(module, tokens)
    return out.transpose(1, 2) if module.sas is None else module.sas.average(out), None


def mask(
    *args: Any, mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """What the attention function is given as a mask.

    For plain causal attention the padding alone, (B, S) bool, or None where there is none; else, for windows and
    packed documents, what transformers' own attention would get, (B, 1, T, S) bool.
    """
    if mask_function is not causal_mask_function:
        kwargs |= {"mask_function": mask_function, "attention_mask": attention_mask}
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None
    return attention_mask.bool()


def _masks(given: Tensor | None, batch: int, length: int) -> tuple[Tensor | None, Tensor | None]:
    """The key mask (B, T) and segment ids (B, T) of the new tokens, from what `mask` made or a caller gave."""
    if given is None:
        return None, None
    if given.ndim == 2:
        return given[:, -length:].bool(), None
    seen = given[:, 0] if given.dtype == torch.bool else given[:, 0] >= 0
    if given.ndim != 4 or given.shape[1] != 1 or seen.shape[1:] != (length, length):
        raise ValueError(
            f"a converted layer attends causally, to real tokens of a document: give attention_mask (B, S), got "
            f"{tuple(given.shape)}"
        )
    real = seen.diagonal(dim1=1, dim2=2)
    first = seen.int().argmax(-1)  # the first token that each sees
    causal = torch.ones(length, length, dtype=torch.bool, device=given.device).tril()
    expected = causal & (first[:, :, None] == first[:, None]) & real[:, None] & real[:, :, None]
    if not torch.equal(expected, seen & real[:, :, None]):
        raise ValueError(
            "a converted layer attends causally, to real tokens of a document; this attention_mask (B, 1, T, S) "
            "says otherwise: leave it out"
        )
    return (None if bool(real.all()) else real.expand(batch, -1)), first.expand(batch, -1)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)

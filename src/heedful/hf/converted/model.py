"""What a converted causal model adds to its source's."""

from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heedful.attention.eviction import Eviction
from heedful.attention.registry import SCORES
from heedful.attention.score import Score
from heedful.hf.budgeted import BudgetedGenerationMixin
from heedful.hf.cache import HeedfulCache
from heedful.hf.converted.attention import NAME, ConvertedAttention, converted_class
from heedful.hf.converted.beside import write_beside
from heedful.hf.converted.sas import Expansion, SimulatedHeads
from heedful.hf.converted.settings import Conversion
from heedful.hf.converted.softcap import cap_logits
from heedful.hf.names import CACHE, one_cache
from heedful.hf.packing import segments_of
from heedful.hf.saved import replacing_weights


class ConvertedGenerationMixin(BudgetedGenerationMixin):
    """Stands before the source's causal model: installs the attention, the cache, `generate` under a budget."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self)

    def new_cache(self, eviction: Eviction | None = None) -> HeedfulCache:
        """An empty cache for this model.

        Layers with a sliding window hold that, whatever the eviction says, where others have none; if all have one,
        the eviction acts within it.
        """
        windows = windows_of(self.config)
        own = None in windows
        return HeedfulCache(len(windows), eviction or Eviction(), windows=windows, own=own, converted=True)

    @property
    def scores(self) -> list[Score]:
        """The score of every layer without a sliding window."""
        model: Any = self
        return [module.score for module in attention_layers(model) if not module.slides]

    def saved_eviction(self) -> Eviction:
        """What the model's config asks for."""
        return Eviction.of(Conversion.of(self.config).eviction)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's; a cache is one of ours."""
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        use_cache = kwargs.pop("use_cache", None)
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if cache is None and use_cache and not _packed(kwargs):
            cache = self.new_cache()
        given: dict[str, Any] = {} if cache is None else {CACHE: cache}
        output: Any = super().forward(*args, use_cache=cache is not None, **given, **kwargs)  # type: ignore[misc]
        if isinstance(cache, HeedfulCache):
            cache.tick()
        return output

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the source's; where that drops the cache, as Phi-3 does to read anew, a new one evicts alike."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        held = kwargs.get(CACHE)
        if isinstance(held, HeedfulCache) and inputs.get(CACHE) is None:
            inputs[CACHE] = self.new_cache(held.eviction)
        return inputs

    def save_pretrained(
        self, save_directory: str | PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As in transformers; the folder also gets a model card, and a module by which it loads anywhere."""
        if is_main_process and not Path(save_directory).is_file():
            write_beside(self, Path(save_directory))
        self.keep_kv_settings()
        with replacing_weights(Path(save_directory)) if is_main_process else nullcontext():
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Raises a ValueError: a converted model attends as its config's `heedful` says."""
        self._check_and_adjust_attn_implementation(attn_implementation)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation not in (None, NAME):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is not supported by a converted model: it would "
                f"attend without selection; leave it out, or convert it back (heedful convert --back)"
            )
        return NAME

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Score | Expansion):
            start(module)
        elif not getattr(module, "_of_a_score", False):
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: transformers would copy the source of this class into every saved folder."""


def _packed(inputs: dict[str, Any]) -> bool:
    """Whether positions start over: packed documents, which transformers tells apart only without a cache."""
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None or torch.compiler.is_compiling():
        return False
    return segments_of(positions, positions.shape[0]) is not None


def attention_layers(model: nn.Module) -> list[Any]:
    """The attention modules of a model, by layer."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, ConvertedAttention)
        or (
            hasattr(module, "layer_idx")
            and hasattr(module, "is_causal")
            and "Attention" in type(module).__name__
        )
    ]
    return sorted(found, key=lambda module: module.layer_idx)


def windows_of(config: Any) -> list[int | None]:
    """The sliding window of each layer of a model, None where it attends to all tokens."""
    window = getattr(config, "sliding_window", None)
    n = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * n
    return [window if "sliding" in kind else None for kind in kinds]


def install(model: Any) -> None:
    """Give the attention modules of a source's model heedful's attention; new parameters start without effect.

    Raises:
        ValueError: if the model has layers that cannot be converted.
    """
    conversion, layers, windows = (
        Conversion.of(model.config),
        attention_layers(model),
        windows_of(model.config),
    )
    heads = model.config.num_attention_heads
    groups = getattr(model.config, "num_key_value_heads", None) or heads
    if len(layers) != len(windows):
        raise ValueError(
            f"{type(model).__name__} has {len(windows)} layers but {len(layers)} attention modules that are "
            f"known; it cannot be converted"
        )
    score_config = conversion.score_config()
    sizes = conversion.sizes(model.config)
    if sizes is not None:
        heads, groups = sizes.sim_heads, sizes.sim_kv_heads
    selectors = getattr(score_config, "selectors", 1)
    if selectors not in (1, groups):
        raise ValueError(f"selectors must be 1 or the number of key/value heads ({groups}), got {selectors}")
    stretch, rotates = stretch_of(model), any("rotary" in name for name, _ in model.named_modules())
    for module, window in zip(layers, windows, strict=True):
        if not isinstance(module, ConvertedAttention):
            source: Any = type(module)
            module.__class__ = converted_class(source)
        module.slides, module.window = window is not None and None in windows, window
        module.stretch, module.rotates = stretch, rotates
        module.sas = None
        if module.slides:
            continue
        like = next(module.parameters())
        score = SCORES[conversion.score].module_class(score_config, heads, model.config.hidden_size)
        cap = getattr(model.config, "attn_logit_softcapping", None)
        if cap is not None:
            cap_logits(score, cap)
        for part in score.children():
            part._of_a_score = True
        module.score = score.to(like.device, like.dtype)
        start(module.score)
        if sizes is not None:
            module.sas = SimulatedHeads(sizes).to(like.device, like.dtype)
            start(module.sas)


def start(added: Score | SimulatedHeads | Expansion) -> None:
    """Fresh weights of what a converted model has more than its source: it has no effect, no vote is cast."""
    added.reset_parameters()
    if isinstance(added, Score):
        added.silence()


def stretch_of(model: nn.Module) -> float:
    """What rotation multiplies lengths by, as YaRN and LongRoPE do; the most of any layer."""
    names = "attention_scaling", "full_attention_attention_scaling", "sliding_attention_attention_scaling"
    found = [getattr(module, name, None) for module in model.modules() for name in names]
    return max([1.0, *(float(value) for value in found if isinstance(value, int | float))])

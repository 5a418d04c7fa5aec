"""A model of heedful as lm-evaluation-harness sees it: every request is answered under the budget asked for.

Log-likelihoods come from one forward pass with an evicting cache, which replays the evictions exactly; texts from
`generate` with such a cache. How requests are tokenized, sorted, batched and scored is the harness's own `HFLM`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from heedful.attention.eviction import Eviction
from heedful.attention.eviction.settings import AnyBudget
from heedful.evaluation.search import check_policy
from heedful.hf.budgeted import KV_NAMES
from heedful.hf.cache import HeedfulCache
from heedful.hf.load import load_model, load_tokenizer
from heedful.hf.names import output_cache
from heedful.ops.checks import did_you_mean

NAME = "heedful"
"""What `lm_eval --model` calls it."""
ARGUMENTS = (
    *("pretrained", *KV_NAMES, "batch_size", "max_batch_size", "device", "dtype", "max_length"),
    *("add_bos_token", "think_end_token", "enable_thinking", "chat_template_args"),
)
"""What `--model_args` may hold."""
CACHE_NAMES = "use_cache", "past_key_values", "cache_implementation", "cache"


class HeedfulLM(HFLM):
    """A model trained with heedful or converted, in lm-evaluation-harness.

    Args:
        pretrained: its folder.
        kv_budget: tokens held per layer, as in `generate`, as all that begins with `kv_`: what is left out is as
            the model's own config says. A list with one per layer needs `--model_args` as JSON.
        kv_policy: which token goes.
        kv_evict_every: evict only at token positions divisible by it.
        kv_threshold: votes above which a token goes at once.
        kv_grace: the newest tokens that never go.
        kv_first: the first tokens that never go.
        batch_size: requests at a time, or "auto".
        max_batch_size: the most that "auto" tries.
        device: where to run; a GPU if there is one.
        dtype: such as "bfloat16"; "auto" leaves the weights as they were saved.
        max_length: the most tokens that the model is given at once; what its config says if left out.
        add_bos_token: whether texts begin with the start token; if left out they do for models trained with
            heedful, whose training texts do, and for converted ones the tokenizer says.
        think_end_token: as in `HFLM`.
        enable_thinking: as in `HFLM`.
        chat_template_args: as in `HFLM`.
        **unknown: refused.

    Raises:
        FileNotFoundError: where there is no model or no tokenizer.
        ValueError: for an unknown argument, an unsound budget, or a policy that does not go with the model.
    """

    eviction: Eviction
    """What the cache of each layer holds; changed by `hold`."""
    held = 0
    """The most tokens that any layer has held since `hold`."""
    evicted = False
    """Whether anything has been evicted since `hold`."""
    report: Callable[[int, int], None] | None = None
    """Called with requests done and to do; where it is set the harness's own bars are off."""

    def __init__(
        self,
        pretrained: str | Path,
        *,
        kv_budget: AnyBudget = None,
        kv_policy: str | None = None,
        kv_evict_every: int | None = None,
        kv_threshold: float | None = None,
        kv_grace: int | None = None,
        kv_first: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        device: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise ValueError(
                f"model_args: {name!r} is not known; {did_you_mean(name, ARGUMENTS)}"
                f"expected of {', '.join(ARGUMENTS)}"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "the model 'heedful' runs in one process; start lm_eval without accelerate launch"
            )
        model, tokenizer = load_model(pretrained), load_tokenizer(pretrained)
        self._starts_bare = False
        if add_bos_token is None and model.config.model_type == "heedful":
            add_bos_token = True
        if add_bos_token is not None:
            tokenizer.add_bos_token = add_bos_token
        if dtype != "auto":
            model = model.to(_dtype(dtype))
        model.to(_device(device))
        with _unwarned():  # that a model was given where most give a name
            super().__init__(
                model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                max_length=max_length,
                add_bos_token=add_bos_token,
                think_end_token=think_end_token,
                enable_thinking=enable_thinking,
                chat_template_args=chat_template_args,
            )
        asked = kv_budget, kv_policy, kv_evict_every, kv_threshold, kv_grace, kv_first
        eviction = model.resolve_eviction(*asked)
        for name in KV_NAMES:  # they are in the eviction now, and would be mixed into every later one
            setattr(model.generation_config, name, None)
        self.hold(eviction)

    def hold(self, eviction: Eviction) -> None:
        """From here on the cache of each layer holds what `eviction` says.

        Raises:
            ValueError: for a list of budgets of the wrong length, or a policy that does not go with the model.
        """
        if eviction.evicts:
            check_policy(self.model, eviction.policy)
        self.model.new_cache(eviction)
        self.eviction, self.held, self.evicted = eviction, 0, False

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse a store of answers: it knows them by the request alone, whatever the budget was."""
        if getattr(cache_hook, "dbdict", None) is not None:
            raise ValueError(
                "use_cache keeps answers by the request alone and would give those of another budget; leave it out"
            )
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model; nothing is asked of a hub."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "eviction": self.eviction.to_dict(),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, *args: Any, **kwargs: Any
    ) -> list[int]:
        """As in `HFLM`."""
        if self._starts_bare:
            add_special_tokens = False
        return super().tok_encode(string, add_special_tokens, *args, **kwargs)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether it is the most likely."""
        with self._reporting(len(requests)) as quiet:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or quiet)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in pieces of `max_length` tokens that begin with an empty cache."""
        # The harness puts a start token before every text. Tokenizers of stock models may add another, in the
        # stock harness as well; the one that ours add was only ever seen once.
        self._starts_bare = self.model.config.model_type == "heedful"
        pieces = 0
        try:
            if self.report is not None:
                lengths = [len(self.tok_encode(request.args[0])) for request in requests]
                pieces = sum(-(-length // self.max_length) for length in lengths)
            with self._reporting(pieces) as quiet:
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or quiet)
        finally:
            self._starts_bare = False

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, by `generate`."""
        with self._reporting(len(requests)) as quiet:
            return super().generate_until(requests, disable_tqdm=disable_tqdm or quiet)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        return super()._loglikelihood_tokens(requests, disable_tqdm or self.report is not None, override_bs)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), padded on the right, where it changes nothing before."""
        if attn_mask is not None or labels is not None:
            raise ValueError(
                "a causal model takes tokens alone, got a mask or labels of an encoder and a decoder"
            )
        with torch.no_grad():
            if self.eviction.evicts:
                cache = self.model.new_cache(self.eviction)
                logits = self.model(inps, past_key_values=cache).logits
                self._count(cache)
            else:
                logits = self.model(inps, use_cache=False).logits
                self.held = max(self.held, inps.shape[1])
        self._step(len(inps))
        return logits

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        for name in (*KV_NAMES, *CACHE_NAMES):
            if name in generation_kwargs:
                raise ValueError(
                    f"{name!r} is no setting of a task: what the cache holds is said in --model_args"
                )
        output = super()._model_generate(
            context,
            max_length,
            stop,
            kv_budget=self.eviction,
            return_dict_in_generate=True,
            **generation_kwargs,
        )
        self._count(output_cache(output))
        self._step(len(context))
        return output.sequences

    def _count(self, cache: HeedfulCache) -> None:
        self.held = max(self.held, *cache.kept)
        self.evicted |= any(cache.stats.evictions)

    @contextmanager
    def _reporting(self, total: int) -> Iterator[bool]:
        """Whether somebody listens. Equal requests are read once: what is left at the end is done as well."""
        self._done, self._total = 0, total
        yield self.report is not None
        self._step(total - self._done)

    def _step(self, count: int) -> None:
        if self.report is not None and count > 0:
            self._done = min(self._done + count, self._total)
            self.report(self._done, self._total)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be auto or a type of torch, such as bfloat16, got {name!r}")
    return found


def _device(asked: str | None) -> str:
    """Where to run. "cuda:0" is what the harness's command says where nothing was asked for."""
    if torch.cuda.is_available():
        return asked or "cuda"
    if asked is not None and asked.startswith("cuda"):
        logging.getLogger(HFLM.__module__).warning("there is no CUDA here; the model runs on the CPU")
    return asked if asked is not None and not asked.startswith("cuda") else "cpu"


@contextmanager
def _unwarned() -> Iterator[None]:
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

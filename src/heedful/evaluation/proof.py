"""Proof that a budget is active: text is generated beyond it, what was held and evicted is counted, and checked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from heedful.attention.eviction import Eviction
from heedful.attention.eviction.settings import AnyBudget
from heedful.evaluation.kv_budget import held_bytes
from heedful.hf.budgeted import KV_NAMES
from heedful.hf.cache import HeedfulCache
from heedful.hf.names import CACHE, output_cache

GENERATED = 24
"""Tokens that are generated."""
BEYOND = 16
"""Tokens of the prompt that the budget does not hold."""
ROUNDING = 1e-3
"""What two ways of running may differ by, of the largest logit, in float32."""

Report = Callable[[str, int, int], None]
"""What is being done, how many steps of it are, and how many there will be."""


@dataclass(frozen=True)
class Proof:
    """What a model held, with a budget that is active."""

    eviction: Eviction
    """What was asked for."""
    read: int
    """Tokens that went through the model; the last one generated did not."""
    generated: int
    """Tokens that were generated."""
    held: tuple[int, ...]
    """Tokens held at the end, by layer; layers with a sliding window are left out."""
    evicted: tuple[int, ...]
    """Tokens evicted, by layer."""
    nbytes: int
    """Bytes of the cache."""
    full_bytes: int
    """Bytes that a full cache has for the same tokens, sliding windows kept to."""
    difference: float
    """Largest difference of a logit between generating and one pass with the eviction mask; rounding."""
    effect: float
    """Largest difference of a logit between generating and a full cache."""


def prove_budget(
    model: Any, kv_budget: AnyBudget = None, kv_policy: str | None = None, report: Report | None = None
) -> Proof:
    """Generate beyond the budget, greedily, and check that it was kept to.

    The model runs in float32, where rounding does not decide who goes, with random tokens as a prompt.

    Args:
        model: a trained or converted model; it becomes float32.
        kv_budget: as in `generate`; None: what is saved with the model.
        kv_policy: as in `generate`.
        report: called as it goes on.

    Raises:
        ValueError: if no budget is asked for, the model reads too few tokens for it, nothing was evicted, more was
            held than allowed, or the tokens are not those of one pass with the eviction mask.
    """
    say = report or (lambda what, done, total: None)
    eviction = model.resolve_eviction(kv_budget, kv_policy)
    if not eviction.evicts:
        raise ValueError(
            "no budget is active: none is saved with the model and none is given; give --kv-budget, or save one "
            "(heedful convert --kv-budget, heedful budget)"
        )
    n_layers = len(model.new_cache(Eviction()).layers)
    prompt_length = _prompt_length(eviction.budgets(n_layers), model.config)
    model = model.float().eval()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, prompt_length), generator=generator)
    prompt = prompt.to(model.device)
    with _greedy(model):
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            kv_budget=kv_budget,
            kv_policy=kv_policy,
            max_new_tokens=GENERATED,
            streamer=_Steps(say),
            output_logits=True,
            return_dict_in_generate=True,
        )
    cache = output_cache(output)
    _check_held(cache, eviction, n_layers)
    logits = torch.cat(output.logits).float()
    say("one pass with the eviction mask", 0, 1)
    again, _ = _one_pass(model, output.sequences, eviction, prompt_length)
    _check_tokens(logits, again)
    say("one pass with a full cache", 0, 1)
    everything, full = _one_pass(model, output.sequences, Eviction(), prompt_length)
    if cache.stats.evictions == full.stats.evictions:
        raise ValueError(
            f"nothing was evicted in {cache.seen:,} tokens that the model's sliding window lets stay; give a "
            f"budget below the window"
        )
    return Proof(
        eviction=eviction,
        read=cache.seen,
        generated=len(logits),
        held=tuple(cache.kept),
        evicted=tuple(cache.stats.evictions),
        nbytes=cache.nbytes,
        full_bytes=held_bytes(full),
        difference=float((logits - again).abs().max()),
        effect=float((logits - everything).abs().max()),
    )


def _prompt_length(budgets: list[int | None], config: Any) -> int:
    """Tokens of a prompt that is longer than every budget, or as long as the model allows."""
    longest, shortest = (pick([b or BEYOND for b in budgets]) for pick in (max, min))
    most = getattr(config, "max_position_embeddings", None) or longest + BEYOND + GENERATED
    length = min(longest + BEYOND, most - GENERATED)
    if length + GENERATED - 1 <= shortest or length < 1:
        raise ValueError(
            f"the budget of {shortest:,} tokens can never be exceeded: the model reads {most:,} tokens at most; "
            f"give a smaller one"
        )
    return length


@contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """The model's generation config with its budget alone: no sampling, no penalties, no end of text.

    No pair of tokens comes twice: where a text goes round in circles its tokens get the same votes, and rounding
    would decide who goes.
    """
    own = model.generation_config
    plain = GenerationConfig(pad_token_id=0, no_repeat_ngram_size=2)
    for name in KV_NAMES:
        if getattr(own, name, None) is not None:
            setattr(plain, name, getattr(own, name))
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = own


class _Steps(BaseStreamer):
    """Says how many tokens there are."""

    def __init__(self, say: Report) -> None:
        self.say, self.calls = say, 0

    def put(self, value: Tensor) -> None:
        self.say("generating", self.calls, GENERATED)  # the first call brings the prompt
        self.calls += 1

    def end(self) -> None:
        pass


def _check_held(cache: HeedfulCache, eviction: Eviction, n_layers: int) -> None:
    """Raise a ValueError unless something was evicted, and every layer held what it may."""
    if not any(cache.stats.evictions):
        votes = (
            f": no token had more than {eviction.threshold:g} votes against it" if eviction.threshold else ""
        )
        raise ValueError(f"nothing was evicted in {cache.seen:,} tokens{votes}; the budget is not active")
    layers = zip(cache.layers, eviction.budgets(n_layers), strict=True)
    for number, (layer, budget) in enumerate(layers):
        memory = getattr(layer, "memory", None)
        if memory is None:  # a sliding window of its own
            continue
        kept, gone = memory.kept, memory.evicted
        allowed = cache.seen if budget is None else budget + eviction.evict_every - 1
        if kept > allowed:
            raise ValueError(f"layer {number} holds {kept:,} tokens, more than the {allowed:,} that it may")
        if kept + gone != cache.seen:
            raise ValueError(
                f"layer {number} holds {kept:,} tokens and evicted {gone:,}, of {cache.seen:,} that it read"
            )


@torch.no_grad()
def _one_pass(model: Any, ids: Tensor, eviction: Eviction, start: int) -> tuple[Tensor, HeedfulCache]:
    """The logits (n, V) that predict the tokens from `start` on, read with all before at once; and the cache."""
    cache = model.new_cache(eviction)
    logits = model(ids[:, :-1], **{CACHE: cache}).logits[0, start - 1 :].float()
    return logits, cache


def _check_tokens(logits: Tensor, again: Tensor) -> None:
    """Raise a ValueError unless one pass says the same, but for rounding: the logits, and so the next tokens."""
    level = ROUNDING * float(again.abs().max())
    apart = (logits - again).abs().amax(-1)
    first, here = logits.argmax(-1), again.argmax(-1)
    for i in (apart > level).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"generating disagrees with one pass with the eviction mask: after {i} of {len(logits)} tokens it says "
            f"{int(first[i])} and the pass {int(here[i])}, and logits are {float(apart[i]):.3g} apart"
        )

"""`heedful generate`."""

import math
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any

from rich.console import Console

from heedful.attention.eviction import POLICIES, Eviction
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, kv_budget_of, parse, positional
from heedful.screen import counted, spinner

DESCRIPTION = """Continue a prompt with a trained model.

    heedful generate runs/a "It is a truth" --max-new-tokens 100 --temperature 0.8
    heedful generate runs/a "It is a truth" --kv-budget 32 --stats      # a cache of 32 tokens per layer
    heedful generate runs/a "It is a truth" --kv-threshold 20 --stats   # forget tokens with more than 20 votes

The policy "selective" needs a model with --score selective; the others go with any."""


def run(arguments: Sequence[str]) -> int:
    """Generate, streaming to standard output."""
    values = parse(
        "generate",
        DESCRIPTION,
        [
            positional("run", str, MISSING, "folder of a trained model"),
            positional("prompt", str, "", "text to continue; empty starts a document"),
            flag("max_new_tokens", int, 100, "tokens to add, at most"),
            flag("temperature", float, 0.8, "0 takes the most likely token; higher is more varied"),
            flag("top_k", int, 50, "draw from the k most likely tokens; 0 draws from all"),
            flag("seed", int, 0, "seed of the draws"),
            flag(
                "kv_budget", str | None, None, "tokens the cache of each layer holds: 64, 64,32,..., or full"
            ),
            flag(
                "kv_policy",
                str | None,
                None,
                f"which token is evicted: {', '.join(POLICIES)}; if left out: the saved one, or selective",
            ),
            flag("kv_evict_every", int | None, None, "evict at every so many tokens only"),
            flag("kv_threshold", float | None, None, "votes above which a token is forgotten at once, > 0"),
            flag("kv_grace", int | None, None, "newest tokens that are never evicted"),
            flag("kv_first", int | None, None, "first tokens that are never evicted"),
            flag("stats", bool, False, "say afterwards what the cache held, and how fast it went"),
        ],
        arguments,
    )
    try:
        values["prompt"].encode()
    except UnicodeEncodeError:
        raise UsageError(f"PROMPT must be UTF-8 text, got {values['prompt']!r}; convert it first") from None
    if values["max_new_tokens"] < 1:
        raise UsageError(f"--max-new-tokens must be 1 or more, got {values['max_new_tokens']}")
    if not 0 <= values["temperature"] < math.inf:
        raise UsageError(f"--temperature must be 0 or more and finite, got {values['temperature']}")
    if values["top_k"] < 0:
        raise UsageError(f"--top-k must be 0 or more, got {values['top_k']}")
    budget = kv_budget_of(values["kv_budget"])
    more = {
        name: values[name] for name in ("kv_policy", "kv_evict_every", "kv_threshold", "kv_grace", "kv_first")
    }
    try:  # a budget that is not given may be in the model's config: a large one stands for it
        Eviction.of(10**9 if budget is None else budget, **more)
    except ValueError as error:
        raise UsageError(str(error)) from None

    with spinner(Console(stderr=True), "loading the model"):
        from transformers import TextStreamer, set_seed

        from heedful.hf.generation import continue_text
        from heedful.hf.load import load_model, load_tokenizer

        model, tokenizer = load_model(values["run"]), load_tokenizer(values["run"])
    set_seed(values["seed"])
    _, cache = continue_text(
        model,
        tokenizer,
        values["prompt"],
        max_new_tokens=values["max_new_tokens"],
        temperature=values["temperature"],
        top_k=values["top_k"],
        kv_budget=budget,
        **more,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )
    if values["stats"]:
        print(_stats(cache, values["kv_threshold"] is not None), file=sys.stderr)
    return 0


def _stats(cache: Any, certified: bool) -> str:
    """What the cache held, lost and cost."""
    stats, per_layer = cache.stats, ", ".join(map(str, cache.kept))
    lines = [
        f"cache: {counted(cache.seen, 'token')} seen, {per_layer} kept per layer, "
        f"{counted(sum(stats.evictions), 'eviction')}",
        f"{cache.nbytes:,} bytes now, {stats.peak_bytes:,} at most",
    ]
    if certified:
        lost = max(float(bound.max()) for bound in cache.forgotten)
        lines.append(f"attention mass lost by any query of any layer: at most {lost:.3g}")
    if stats.tokens_per_second is not None:
        lines.append(f"{stats.tokens_per_second:,.0f} tokens/s after the prompt")
    return "; ".join(lines)

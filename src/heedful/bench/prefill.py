"""Reading a long prompt: plain attention, selective attention, and selective attention under a budget."""

from collections.abc import Callable

import torch
from torch import Tensor

from heedful.attention.build import build
from heedful.attention.eviction import EvictingCache
from heedful.attention.tokens import Tokens
from heedful.bench.forms import Form, available, best_plain, named, ours
from heedful.bench.kernels import Sizes, read
from heedful.bench.workload import Case, Workload
from heedful.ops.native.library import preferred
from heedful.ops.selective.auto_rule import choose
from heedful.ops.selective.triton.available import trusted

BUDGET = 512


def pruned_name(budget: int) -> str:
    """How the pruned case is called."""
    return f"pruned, budget {budget}"


def prefill_workload(
    length: int, budget: int, evict_every: int, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Workload:
    """From q, k and v of a prompt to the outputs of the heads; no projections.

    Args:
        length: T.
        budget: tokens that the pruned case holds.
        evict_every: it evicts at positions divisible by this.
        sizes: of the attention; values as wide as keys.
        device: where to run.
        dtype: of q, k and v.
    """
    q, k, v = sizes.draw(length, device, dtype)
    name, plain = best_plain(lambda form: read(form, q, k, v), device)
    usable, left_out = available(device, dtype)
    picked = "native" if preferred(device.type, dtype) else choose(device.type, length, length, trusted(q, v))
    forms: dict[str, Form] = {name: plain}
    if picked in usable:
        forms[named(picked)] = ours(picked)
    flops, moved = sizes.flops(length, "prefill"), sizes.bytes(length, "prefill", dtype)
    cases = [Case(case, read(form, q, k, v), flops, moved) for case, form in forms.items()]
    held = min(budget, length)
    # the first `held` queries see a triangle, the others `held` keys each
    seen = held * (held + 1) / 2 + (length - held) * held
    pruned_flops = 2.0 * sizes.batch * sizes.n_heads * seen * (sizes.head_dim + sizes.value_dim)
    run = pruned(q, k, v, budget, evict_every)
    cases.append(Case(pruned_name(budget), run, pruned_flops, moved))
    return Workload(
        name="prefill",
        length=length,
        tokens=sizes.batch * length,
        cases=cases,
        baselines={"vs SDPA": name},
        left_out=left_out,
    )


def pruned(q: Tensor, k: Tensor, v: Tensor, budget: int, evict_every: int) -> Callable[[], Tensor]:
    """What a layer of a model does between its projections, with an empty cache of `budget` tokens.

    Args:
        q: (B, H, T, D).
        k: (B, G, T, D).
        v: (B, G, T, D).
        budget: tokens held.
        evict_every: evict at positions divisible by this.
    """
    batch, heads, length, size = q.shape
    attention = build(
        "gqa", score="selective", d_model=heads * size, n_heads=heads, n_kv_heads=k.shape[1], rope=False
    ).to(q.device)
    tokens = Tokens(q.new_zeros(batch, length, heads * size), q, {"k": k, "v": v}, None, None)

    def run() -> Tensor:
        cache = EvictingCache(budget, evict_every=evict_every)
        with torch.no_grad():
            return cache.attend(attention, tokens)

    return run

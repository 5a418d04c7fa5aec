"""The attention part of one decoding step: a full cache, and slots that hold a part of it.

From the q, k, v of a new token to the outputs of the heads: choosing the slot to overwrite, writing, attending,
voting. Every step gets a token of its own. The baseline is what a plain cache costs at least: PyTorch's
scaled_dot_product_attention over preallocated keys, without even appending the new one.

A measurement is one step of LAYERS layers, each with a cache of its own, and what is reported is the time of one
layer. Other layers' keys lie between two steps of a layer then, as in a model, while the code is as warm as in one;
a single call after a pause would meet cold code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heedful.attention.build import build
from heedful.attention.cache import LayerCache
from heedful.attention.eviction import EvictingCache
from heedful.attention.tokens import Tokens
from heedful.bench.timing import Timing, interleaved
from heedful.ops.eviction import most_voted_slot
from heedful.ops.selective import selective_attention

LAYERS = 8
TOKENS = 64  # drawn once, used in turn


@dataclass(frozen=True)
class DecodeCase:
    """One line of the benchmark."""

    name: str
    context: int
    """Tokens that were read."""
    kept: int
    """Tokens that are held."""
    baseline: str
    """Name of the case it is compared with."""
    layers: Sequence[Callable[[], Any]]
    """The step of each layer."""

    def run(self) -> list[Any]:
        """One step of all layers."""
        return [step() for step in self.layers]


def decode_cases(
    context: int,
    shares: Sequence[int],
    *,
    n_heads: int = 8,
    n_kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    compiled: bool = True,
) -> list[DecodeCase]:
    """The cases for one context, to be run in turn.

    Args:
        context: T, tokens read.
        shares: budgets as divisors of the context: 4 keeps a quarter.
        n_heads: H.
        n_kv_heads: G; H if None.
        head_dim: D.
        dtype: of queries, keys and values.
        device: where to run.
        compiled: also the step compiled by torch.compile, which needs a C++ compiler on the CPU.
    """
    groups = n_kv_heads or n_heads
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, n: int) -> Tensor:
        return torch.randn(1, heads, n, head_dim, generator=generator).to(device, dtype)

    q, k, v = draw(n_heads, TOKENS), draw(groups, TOKENS), draw(groups, TOKENS)
    turn = count()

    def token() -> tuple[Tensor, Tensor, Tensor]:
        now = next(turn) % TOKENS
        return q[:, :, now : now + 1], k[:, :, now : now + 1], v[:, :, now : now + 1]

    def sdpa(n: int) -> Callable[[], Tensor]:
        keys, values = draw(groups, n), draw(groups, n)
        gqa = groups != n_heads
        return lambda: F.scaled_dot_product_attention(token()[0], keys, values, enable_gqa=gqa)

    full = "plain SDPA, full cache"
    cases = [DecodeCase(full, context, context, full, [sdpa(context) for _ in range(LAYERS)])]
    steps = [_full_step(draw, token, groups, context) for _ in range(LAYERS)]
    cases.append(DecodeCase("selective, full cache", context, context, full, steps))
    for share in shares:
        kept = context // share
        plain, slots = f"plain SDPA, T/{share} keys", f"selective slots, T/{share}"
        cases.append(DecodeCase(plain, context, kept, full, [sdpa(kept) for _ in range(LAYERS)]))
        for how in ("", ", compiled") if compiled else ("",):
            made = [_slot_step(draw, token, groups, kept, compiled=bool(how)) for _ in range(LAYERS)]
            steps, choices = (list(x) for x in zip(*made, strict=True))
            cases.append(DecodeCase(slots + how, context, kept, plain, steps))
            if not how:
                cases.append(DecodeCase(f"  of it choosing, T/{share}", context, kept, slots, choices))
    return cases


def bench_decode(
    cases: Sequence[DecodeCase], *, turns: int = 50, progress: Callable[[int, int], None] | None = None
) -> list[tuple[DecodeCase, Timing]]:
    """Time the cases of `decode_cases` in turn; the times are those of one layer."""
    with torch.no_grad():
        timings = interleaved(
            {case.name: case.run for case in cases}, turns=turns, warmup=8, progress=progress
        )
    return [(case, _of_one_layer(timings[case.name], len(case.layers))) for case in cases]


def _of_one_layer(timing: Timing, n: int) -> Timing:
    seconds = {name: getattr(timing, name) / n for name in ("seconds", "low", "high")}
    return replace(timing, **seconds, samples=tuple(sample / n for sample in timing.samples))


def _full_step(
    draw: Callable[[int, int], Tensor],
    token: Callable[[], tuple[Tensor, Tensor, Tensor]],
    groups: int,
    context: int,
) -> Callable[[], Tensor]:
    cache = LayerCache(block=4096)
    with torch.no_grad():
        cache.append(k=draw(groups, context), v=draw(groups, context))
        cache.state = {"soft_mask": _few_votes(context, token()[0].device)}

    def step() -> Tensor:
        q, k, v = token()
        held = cache.append(k=k, v=v)
        out, votes = selective_attention(q, held["k"], held["v"], soft_mask=cache.state["soft_mask"])
        cache.state = {"soft_mask": votes}
        return out

    return step


def _slot_step(
    draw: Callable[[int, int], Tensor],
    token: Callable[[], tuple[Tensor, Tensor, Tensor]],
    groups: int,
    kept: int,
    compiled: bool = False,
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A whole step over slots, and the choice of the slot alone."""
    q, k, _ = token()
    n_heads, size = q.shape[1], q.shape[-1]
    layer = build("gqa", "selective", d_model=n_heads * size, n_heads=n_heads, n_kv_heads=groups, rope=False)
    x, cache = q.new_zeros(1, 1, n_heads * size), EvictingCache(kept)
    with torch.no_grad():
        memory = {"k": draw(groups, kept), "v": draw(groups, kept)}
        positions = torch.arange(kept, device=k.device)[None]
        votes = {"soft_mask": _few_votes(kept, k.device)}
        cache.slots.allocate(memory, votes, kept, scores=None)
        everything = torch.ones(1, kept, dtype=torch.bool, device=k.device)
        cache.slots.pack(memory, positions, votes, everything, None)
        cache.seen = kept

    def step(q: Tensor, k: Tensor, v: Tensor, cache: EvictingCache) -> Tensor:
        return cache.attend(layer, Tokens(x, q, {"k": k, "v": v}, None, None))

    run = torch.compile(step, fullgraph=True) if compiled else step
    return lambda: run(*token(), cache), lambda: most_voted_slot(cache.scores, cache.positions)


def _few_votes(n: int, device: torch.device) -> Tensor:
    """(1, 1, n), F of n tokens."""
    votes = torch.rand(1, 1, n, device=device)
    votes[..., 0] = 0
    return votes

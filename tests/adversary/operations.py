"""Random calls of the operations, every implementation of the CPU, against the loop in oracle.py."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tests.adversary.attack import Attack, Broken, Case
from tests.adversary.oracle import Call, loop
from torch import Tensor

from heedful.ops import selective_attention, unmasked_count

IMPLS = ("reference", "sdpa", "blocked", "native", "auto")
TOLERANCE = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-5, 1e-4)}
"""Of outputs and of gradients, relative to the largest expected; that of float32 is its rounding, 6e-8, times the
sums of some hundred products of a call, and as in tests/ops/test_selective.py."""


def start(folder: Path) -> Case:
    torch.set_num_threads(1)
    return case


def case(draw: random.Random, place: Path) -> str:
    """One call by one implementation: outputs, F, gradients, and the soft count of tokens held."""
    dtype = draw.choice([torch.float64, torch.float64, torch.float32])
    impl = draw.choice(IMPLS)
    call, kind = random_call(draw, dtype)
    theirs = {name: x.double().requires_grad_() for name, x in call.tensors.items()}
    tau = draw.choice([0.1, 1.0, 7.0])
    expected = loop(Call(theirs, call.key_mask, call.segment_ids, call.scale), tau)
    ours = {name: x.clone() for name, x in call.tensors.items()}
    if kind == "bad padding":
        fill_padding(draw, ours, call.key_mask)
    ours = {name: x.requires_grad_() for name, x in ours.items()}
    rest = {"key_mask": call.key_mask, "segment_ids": call.segment_ids, "scale": call.scale}
    got = selective_attention(**ours, **rest, impl=impl)
    what = f"{impl}, {dtype}, {kind}, " + ", ".join(f"{n} {tuple(x.shape)}" for n, x in ours.items())
    close(f"out: {what}", got[0], expected[0], TOLERANCE[dtype][0])
    close(f"F: {what}", got[1], expected[1], TOLERANCE[dtype][0])
    gradients(what, ours, theirs, got, expected[:2], TOLERANCE[dtype][1])
    select = [ours.get(f"select_{n}", ours[n][:, :1]) for n in "qk"]
    count = unmasked_count(*select, tau=tau, soft_mask=ours.get("soft_mask"), **rest)
    close(f"count, tau {tau}: {what}", count, expected[2], TOLERANCE[dtype][0])
    return f"{impl} {kind}"


def random_call(draw: random.Random, dtype: torch.dtype) -> tuple[Call, str]:
    """Odd shapes, masks and sizes of numbers."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    batch, groups, repeats, size = (
        draw.choice(n) for n in ((1, 2, 3), (1, 2, 3), (1, 1, 2, 5), (1, 2, 3, 7, 16))
    )
    queries, earlier = draw.choice([1, 1, 2, 3, 7, 9]), draw.choice([0, 0, 1, 4, 11])
    if draw.random() < 0.1:  # more than one block
        batch, groups, repeats, queries, earlier = (
            1,
            1,
            draw.choice([1, 2]),
            draw.choice([63, 65, 70]),
            draw.choice([0, 5]),
        )
    keys, kind = queries + earlier, draw.choice(["usual", "usual", "tiny", "huge", "bad padding", "equal"])

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"q": 2 * randn(batch, groups * repeats, queries, size), "k": randn(batch, groups, keys, size)}
    tensors["v"] = randn(batch, groups, keys, draw.choice([1, 2, 5, 8]))
    selectors = 1
    if draw.random() < 0.5:
        selectors, select_size = (
            draw.choice([n for n in range(1, groups * repeats + 1)]),
            draw.choice([1, 3, 8]),
        )
        tensors["select_q"] = randn(batch, selectors, queries, select_size)
        tensors["select_k"] = randn(batch, selectors, keys, select_size)
    if draw.random() < 0.5:
        tensors["soft_mask"] = randn(batch, selectors, earlier).abs() * draw.choice([1, 1, 40])
    sizes = {"tiny": [1e-30, 1e-12, 1e-3], "huge": [1.0, 30.0, 200.0]}.get(kind, [1.0])
    if dtype == torch.float32:  # a logit of a thousand is rounded to 1e-4 there, one below 1e-38 to nothing
        sizes = [min(max(x, 1e-12), 3.0) for x in sizes]
    tensors = {name: x * draw.choice(sizes) if name != "soft_mask" else x for name, x in tensors.items()}
    if kind == "huge":
        tensors["v"] = tensors["v"] * 1e30 if dtype == torch.float64 else tensors["v"] * 1e9
    if kind == "equal":  # every key votes and weighs alike
        tensors |= {
            name: x[:, :, :1].expand_as(x).clone() for name, x in tensors.items() if name.endswith("k")
        }
    key_mask = segment_ids = None
    if kind == "bad padding" or draw.random() < 0.4:
        key_mask = random_mask(draw, batch, keys, generator)
    if draw.random() < 0.3:
        segment_ids = torch.randint(-1, 2, (batch, keys), generator=generator) * draw.choice([1, 2**40])
        segment_ids = segment_ids.cumsum(-1) if draw.random() < 0.5 else segment_ids
    scale = draw.choice([None, None, 0.3, 1.0])
    return Call({n: x.to(dtype) for n, x in tensors.items()}, key_mask, segment_ids, scale), kind


def random_mask(draw: random.Random, batch: int, keys: int, generator: torch.Generator) -> Tensor:
    """Padding on the left, on the right, or holes; whole rows, too."""
    where = draw.choice(["left", "right", "holes"])
    if where == "holes":
        return torch.rand(batch, keys, generator=generator) > 0.4
    amount = torch.randint(0, keys + 1, (batch, 1), generator=generator)
    return torch.arange(keys) >= amount if where == "left" else torch.arange(keys) < amount


def fill_padding(draw: random.Random, tensors: dict[str, Tensor], key_mask: Tensor | None) -> None:
    """Numbers that nobody may read."""
    assert key_mask is not None
    for name, x in tensors.items():
        if name != "soft_mask":
            bad = draw.choice([float("nan"), float("inf"), -float("inf"), 1e30])
            x.masked_fill_(~key_mask[:, None, key_mask.shape[1] - x.shape[2] :, None], bad)


def gradients(
    what: str,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    got: Sequence[Tensor],
    expected: Sequence[Tensor],
    tolerance: float,
) -> None:
    """Those of a random sum of out and F."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]
    found = []
    for tensors, outs in ((ours, got), (theirs, expected)):
        loss = sum((f * x.double()).sum() for f, x in zip(factors, outs, strict=True))
        grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        found.append(
            [torch.zeros_like(x) if g is None else g for x, g in zip(tensors.values(), grads, strict=True)]
        )
    for name, mine, other in zip(ours, *found, strict=True):
        close(f"gradient of {name}: {what}", mine, other, tolerance, usual_gradient(name, theirs))


def usual_gradient(name: str, tensors: dict[str, Tensor]) -> float:
    """How large the terms are that a gradient is the sum of: they may cancel, their rounding does not."""
    largest = {n: float(x.detach().abs().max()) if x.numel() else 0.0 for n, x in tensors.items()}
    factors = {"q": "k", "k": "q", "select_q": "select_k", "select_k": "select_q"}
    return 1.0 if name == "v" else largest["v"] * largest.get(factors.get(name, ""), 1.0)


def close(what: str, got: Tensor, expected: Tensor, tolerance: float, usual: float = 0.0) -> None:
    """Equal, relative to the largest number of the tensor or to what is usual, and finite."""
    if got.shape != expected.shape:
        raise Broken(f"{what}: {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not got.numel():
        return
    if not got.isfinite().all():
        raise Broken(f"{what}: not finite")
    apart, largest = float((got.double() - expected).detach().abs().max()), usual
    largest = max(largest, float(expected.detach().abs().max()))
    if apart > tolerance * max(largest, 1e-30):
        raise Broken(f"{what}: {apart:.3g} apart, of {largest:.3g}")


ATTACK = Attack(
    "operations",
    "`selective_attention` and `unmasked_count`, every `impl` of the CPU, values and gradients, "
    "against a Python loop",
    0.15,
    start,
)

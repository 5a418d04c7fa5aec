"""Promises about tokens and time: causality, caches, padding, packed sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor

from heedful.attention import Attention, LayerCache
from heedful.testing.promise import Case, assert_close, assert_equal, assert_finite, promise


@promise
def shapes_and_finite(case: Case) -> None:
    """(B, T, C) goes in and comes out, finite, in the same dtype; one token and one row are enough."""
    for dtype in (torch.float32, torch.float64):
        module = case.module(dtype)
        for batch, length in ((case.batch, case.length), (1, 1)):
            x = case.tokens(dtype, batch, length)
            out = module(x)
            assert_equal("shape", tuple(out.shape), tuple(x.shape))
            assert_equal("dtype", out.dtype, dtype)
            assert_finite("output", out)


@promise
def causality(case: Case, *, at: int | None = None) -> None:
    """Changing a later token never changes an earlier output, even by a large change: not by one bit.

    Where the score's kernel chooses how to sum by the size of all tokens, not beyond rounding.
    """
    module, x = case.module(), case.tokens()
    tolerance = 0.0 if module.score.causal_to_the_bit else 1e-14
    for position in range(1, case.length) if at is None else [at]:
        for size in (1.0, 1e4):
            other = x.clone()
            other[:, position:] = size * torch.randn_like(other[:, position:])
            before = module(x)[:, :position], module(other)[:, :position]
            assert_close(f"outputs before token {position}", *before, tolerance=tolerance)


@promise
def batch_order(case: Case) -> None:
    """The rows of a batch do not know of each other: permuted rows give permuted outputs."""
    module, x = case.module(), case.tokens(batch=max(case.batch, 3))
    order = torch.randperm(len(x))
    assert_close("permuted rows", module(x[order]), module(x)[order])
    assert_close("one row alone", module(x[:1]), module(x)[:1])


@promise
def cached_equals_full(case: Case, *, chunks: Sequence[int] | None = None) -> None:
    """Fed piece by piece through a LayerCache, the outputs are those of the whole sequence."""
    module, x = case.module(), case.tokens()
    third = -(-case.length // 3)
    for sizes in [chunks] if chunks else [[1] * case.length, [third, third], [case.length - 1]]:
        with torch.no_grad():
            assert_close(f"in pieces of {sizes}", piecewise(module, x, sizes), module(x))
        assert_close(f"in pieces of {sizes}, with gradients", piecewise(module, x, sizes), module(x))


@promise
def left_padded_equals_unpadded(case: Case, *, padding: Sequence[int] | None = None) -> None:
    """Rows padded on the left, by different amounts, give the outputs of the rows alone; cached too."""
    module, x = case.module(), case.tokens()
    padding = padding or [b * (case.length - 1) // max(case.batch - 1, 1) for b in range(case.batch)]
    mask = torch.arange(case.length, device=x.device) >= torch.tensor(padding, device=x.device)[:, None]
    split = case.length // 2
    cached = piecewise(module, x, [split, 1], key_mask=mask)
    for name, out in (("in one call", module(x, key_mask=mask)), ("cached", cached)):
        for row, pad in enumerate(padding):
            alone = module(x[row : row + 1, pad:])
            assert_close(f"row {row} after {pad} padded tokens, {name}", out[row : row + 1, pad:], alone)


@promise
def padding_content_is_ignored(case: Case) -> None:
    """Padded places, left, right or between, change no real output, whatever stands there, and get no gradient."""
    module, x = case.module(), case.tokens()
    mask = torch.rand(x.shape[:2]).to(x.device) > 0.4
    other = torch.where(mask[..., None], x, 100 * torch.randn_like(x)).requires_grad_()
    out = module(other, key_mask=mask)[mask]
    assert_close("real outputs", out, module(x, key_mask=mask)[mask], tolerance=1e-10)
    (gradient,) = torch.autograd.grad(out.sum(), other)
    assert_close("gradient at padding", gradient[~mask], torch.zeros_like(gradient[~mask]), tolerance=0.0)
    alone = [module(x[row : row + 1, real])[0] for row, real in enumerate(mask) if real.any()]
    assert_close("real outputs, without the padding", out, torch.cat(alone), tolerance=1e-10)


@promise
def padded_queries_get_zeros(case: Case) -> None:
    """The score returns (B, H, T, E) with zeros at padded queries."""
    module, x = case.module(), case.tokens()
    mask = torch.rand(x.shape[:2]).to(x.device) > 0.4
    outs: list[Tensor] = []
    module.score.register_forward_hook(lambda score, given, returned: outs.append(returned[0]))
    module(x, key_mask=mask)
    heads = (case.batch, case.config.score_heads, case.length, case.config.v_dim)
    assert_equal("shape", tuple(outs[0].shape), heads)
    at_padding = outs[0].transpose(1, 2)[~mask]
    assert_close("at padding", at_padding, torch.zeros_like(at_padding), tolerance=0.0)


@promise
def all_padding_is_finite(case: Case) -> None:
    """A row of nothing but padding stays finite, with finite gradients, and disturbs no other row."""
    module, x = case.module(), case.tokens(batch=case.batch + 1)
    x.requires_grad_()
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[0] = False
    out = module(x, key_mask=mask)
    out.square().sum().backward()
    assert_finite("output", out)
    assert_finite("gradients", x.grad, *(p.grad for p in module.parameters()))
    assert_close("the other rows", out[1:], module(x[1:]))


@promise
def packed_equals_separate(case: Case, *, segments: Sequence[int] | None = None, left: int = 0) -> None:
    """Sequences packed in one row give the outputs of the sequences alone; padded and cached too."""
    module, x = case.module(), case.tokens()
    third = max(case.length // 3, 1)
    plans = [(segments, left)] if segments else [([third, third], 0), ([1, third], 2)]
    for sizes, pad in plans:
        ids, mask = packed(x, sizes, pad)
        outs = {
            "in one call": module(x, segment_ids=ids, key_mask=mask if pad else None),
            "cached": piecewise(module, x, [pad + 1, 2], segment_ids=ids, key_mask=mask if pad else None),
        }
        for name, out in outs.items():
            for row in range(len(x)):
                for segment in ids[row].unique():
                    here = (ids[row] == segment) & mask[row]
                    alone = module(x[row : row + 1, here])
                    what = f"row {row}, segment {segment} of {sizes} after {pad} padded tokens, {name}"
                    assert_close(what, out[row : row + 1, here], alone)


def piecewise(module: Attention, x: Tensor, sizes: Sequence[int], **masks: Tensor | None) -> Tensor:
    """The outputs of one pass through a cache, `sizes` tokens at a time; the last piece takes the rest."""
    cache, outs, start = LayerCache(block=4), [], 0
    for size in [*sizes, x.shape[1]]:
        stop = min(start + size, x.shape[1])
        if stop > start:
            parts = {name: None if m is None else m[:, start:stop] for name, m in masks.items()}
            outs.append(module(x[:, start:stop], cache=cache, **parts))
        start = stop
    return torch.cat(outs, dim=1)


def packed(x: Tensor, sizes: Sequence[int], pad: int) -> tuple[Tensor, Tensor]:
    """Segment ids, in no order and other ones in every row, and the mask of the padding on the left."""
    batch, length, _ = x.shape
    ids = torch.empty(batch, length, dtype=torch.long)
    for row in range(batch):
        start = pad
        ids[row, :pad] = 5  # the padding may bear any id
        for n, size in enumerate([*sizes[row % len(sizes) :], length]):
            ids[row, start : start + size] = (5 - 3 * n) % 7
            start += size
    mask = torch.arange(length, device=x.device).expand(batch, -1) >= pad
    return ids.to(x.device), mask

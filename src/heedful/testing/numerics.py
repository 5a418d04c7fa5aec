"""Promises about numbers: gradients, low precision, torch.compile."""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from heedful.testing.promise import Case, assert_close, assert_finite, promise

# One rounding to bf16 is 2^-9 = 0.2 % and a layer chains about ten. Measured over all forms and 12 seeds: the
# worst output is 1.0 % off and the worst median gradient 2.8 %. A single row's gradient may be off by half,
# because it switches where rounding moves a vote or a relu across zero; hence the median.
BF16_OUTPUT, BF16_GRADIENT, BF16_ROWS = 0.02, 0.05, 9


@promise
def gradients_are_right(case: Case) -> None:
    """The float64 gradients of the input and of every parameter are those of finite differences."""
    module, x = case.module(), case.tokens(batch=1, length=min(case.length, 5)).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True)


@promise
def gradients_reach_everything(case: Case) -> None:
    """One backward pass leaves a finite gradient on the input and on every parameter."""
    module, x = case.module(), case.tokens().requires_grad_()
    module(x).square().sum().backward()
    assert_finite("gradient of the input", x.grad)
    for name, parameter in module.named_parameters():
        assert_finite(f"gradient of {name}", parameter.grad)


@promise
def bfloat16_is_close(case: Case) -> None:
    """A bfloat16 module is close to a float32 one with the same weights, forward and backward."""
    low = case.module(torch.bfloat16)
    high = case.config.build().to(case.device)
    high.load_state_dict(low.state_dict())
    x = case.tokens(torch.bfloat16, batch=BF16_ROWS)
    results = []
    for module, given in ((low, x), (high, x.float())):
        given.requires_grad_()
        out = module(given)
        out.float().square().mean().backward()
        assert given.grad is not None
        results.append((out, given.grad))
    assert results[0][0].dtype == torch.bfloat16, f"expected bfloat16 out, got {results[0][0].dtype}"
    rows_are_close("output", results[0][0], results[1][0], BF16_OUTPUT, quantile=1.0)
    rows_are_close("gradient of the input", results[0][1], results[1][1], BF16_GRADIENT, quantile=0.5)


@promise
def autocast_is_close(case: Case) -> None:
    """Under autocast to bfloat16 the outputs and gradients are close to float32, with and without a mask."""
    module, x = case.module(torch.float32), case.tokens(torch.float32, batch=BF16_ROWS).requires_grad_()
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for options in ({}, {"key_mask": mask}):
        expected = module(x, **options)
        (gradient,) = torch.autograd.grad(expected.square().mean(), x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out = module(x, **options)
        (low,) = torch.autograd.grad(out.float().square().mean(), x)
        name = "with a mask" if options else "without a mask"
        rows_are_close(f"output {name}", out, expected, BF16_OUTPUT, quantile=1.0)
        rows_are_close(f"gradient {name}", low, gradient, BF16_GRADIENT, quantile=0.5)


@promise
def compiled_equals_eager(case: Case) -> None:
    """torch.compile(fullgraph=True) equals eager mode, outputs and gradients, with and without padding."""
    module, x = case.module(), case.tokens().requires_grad_()
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[0, : case.length // 2] = False
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    masks: list[dict[str, Any]] = [{}, {"key_mask": mask}]
    for length in (case.length - 1, case.length - 2):  # a second length makes the compiler use symbols
        assert_close(f"output at length {length}", compiled(x[:, :length]), module(x[:, :length]))
    for options in masks:
        wanted = [x, *module.parameters()]
        expected, got = module(x, **options), compiled(x, **options)
        assert_close(f"output with {list(options)}", got, expected)
        gradients = (torch.autograd.grad(out.square().sum(), wanted) for out in (got, expected))
        for ours, theirs in zip(*gradients, strict=True):
            assert_close(f"gradient with {list(options)}", ours, theirs)


def rows_are_close(what: str, got: Tensor, expected: Tensor, tolerance: float, quantile: float) -> None:
    """Raise unless this quantile of the rows' relative errors (of the norms) is within the tolerance."""
    got, expected = got.detach().float().flatten(1), expected.detach().float().flatten(1)
    errors = (got - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-12)
    error, largest = errors.quantile(quantile).item(), errors.max().item()
    if not error <= tolerance:
        of = "worst row" if quantile == 1 else "median row"
        raise AssertionError(
            f"{what}: relative error of the {of} {error:.3g}, allowed {tolerance}; largest {largest:.3g}"
        )

"""What the checks share: a module with generic weights, random inputs, comparisons, the list of checks."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from heedful.attention import Attention, AttentionConfig, configure

TOLERANCE = 1e-8  # in float64, for what is equal in exact arithmetic
SMALL = {"d_model": 32, "n_heads": 4, "init_logit_std": 1.0}  # votes and logits that make a difference


class Check(Protocol):
    """Raises AssertionError if the form breaks the promise in the docstring."""

    def __call__(
        self,
        attention: str,
        score: str = "softmax",
        *,
        batch: int = 2,
        length: int = 9,
        seed: int = 0,
        device: str = "cpu",
        **options: Any,
    ) -> None: ...


CHECKS: dict[str, Check] = {}


@dataclass(frozen=True)
class Case:
    """One form at one size."""

    config: AttentionConfig
    batch: int
    length: int
    device: str

    def module(self, dtype: torch.dtype = torch.float64, config: AttentionConfig | None = None) -> Attention:
        """A module in training mode whose parameters are all generic: no zeros, no ones, no ties."""
        module = (config or self.config).build()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return module.to(self.device, dtype)

    def tokens(self, dtype: torch.dtype = torch.float64, batch: int = 0, length: int = 0) -> Tensor:
        """Random `(B, T, C)`."""
        shape = (batch or self.batch, length or self.length, self.config.d_model)
        return torch.randn(shape, dtype=torch.float64).to(self.device, dtype)


def promise(function: Callable[..., None]) -> Check:
    """Decorator: make `function(case, **keywords)` a check; its docstring's first line is the promise."""
    name, text = function.__name__, (function.__doc__ or "").split("\n")[0]
    own = [p for p in inspect.signature(function).parameters if p != "case"]

    @functools.wraps(function)
    def check(
        attention: str,
        score: str = "softmax",
        *,
        batch: int = 2,
        length: int = 9,
        seed: int = 0,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        keywords = {key: options.pop(key) for key in own if key in options}
        given = {"batch": batch, "length": length, "seed": seed, **keywords, **options}
        where = ", ".join(f"{key}={value!r}" for key, value in given.items())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            case = Case(configure(attention, score, **{**SMALL, **options}), batch, length, device)
            try:
                function(case, **keywords)
            except Exception as error:
                reason = str(error) if isinstance(error, AssertionError) else repr(error)
                message = f"{attention} x {score} breaks {name}: {text} At {where}: {reason}"
                raise AssertionError(message) from error

    CHECKS[name] = check
    return check


def assert_close(what: str, got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise unless the largest error is at most `tolerance` times the largest expected value, or 1."""
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    if not got.numel():
        return
    error = (got.detach().double() - expected.detach().double()).abs().max().item()
    allowed = tolerance * max(1.0, expected.detach().abs().max().item())
    if not error <= allowed:  # NaN is an error too
        raise AssertionError(f"{what}: largest error {error:.3g}, allowed {allowed:.3g}")


def assert_equal(what: str, got: Any, expected: Any) -> None:
    """Raise unless both are equal."""
    if got != expected:
        raise AssertionError(f"{what}: expected {expected}, got {got}")


def assert_finite(what: str, *tensors: Tensor | None) -> None:
    """Raise if a tensor is missing or holds NaN or infinity."""
    for tensor in tensors:
        if tensor is None:
            raise AssertionError(f"{what}: nothing there")
        if not tensor.isfinite().all():
            wrong = int((~tensor.isfinite()).sum())
            raise AssertionError(f"{what}: {wrong} of {tensor.numel()} values are NaN or infinite")

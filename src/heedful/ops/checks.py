"""Argument checks shared by the operations: every message says what was expected, what came, what to do."""

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that `name` was probably meant to be; None if it is like none of them.

    Args:
        name: what was given.
        known: the names there are.
        cutoff: how alike they must be, from 0, anything, to 1, equal.
    """
    near = difflib.get_close_matches(str(name), list(known), 1, cutoff)
    return near[0] if near else None


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`"did you mean 'sas'? "`, to stand inside a message; empty if no name is near."""
    near = nearest(name, known, cutoff)
    return f"did you mean {near!r}? " if near else ""


def show(tensor: Tensor) -> str:
    """`(2, 4, 8, 16) float32 on cpu`: how a tensor is named in an error."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def check_tensor(name: str, value: object, layout: str) -> Tensor:
    """Raise unless `value` is a tensor with as many axes as `layout`, e.g. `"(B, H, T, D)"`, names."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, got {type(value).__name__}")
    if value.ndim != layout.count(",") + 1:
        raise ValueError(f"{name} must have shape {layout}, got {show(value)}")
    return value


def check_float(name: str, value: Tensor) -> None:
    """Raise unless `value` is floating point."""
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {show(value)}; "
            f"convert it with {name}.float()"
        )


def check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have one dtype and one device."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} and {other_name} must have one dtype, got {value.dtype} and {other.dtype}; "
            f"convert with {name}.to({other_name}.dtype)"
        )
    check_device(name, value, other_name, other)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors live on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on one device, got {value.device} and "
            f"{other.device}; move with {name}.to({other_name}.device)"
        )


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], layout: str) -> None:
    """Raise unless `value.shape == expected`; `layout` names the axes."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {layout} = {expected}, got {show(value)}")


def check_divides(what: str, total: int, by_what: str, by: int) -> None:
    """Raise unless `total` is a positive multiple of `by`."""
    if by < 1 or total < 1 or total % by:
        lower = total // by * by if by > 0 else 0
        advice = f"use {lower} or {lower + by}" if lower > 0 else f"use {max(by, 1)}"
        raise ValueError(f"{what} must be a multiple of {by_what} ({by}), got {total}; {advice}")


def check_most(name: str, value: int, most: int) -> None:
    """Raise for a size beyond what can be meant, before anything of that size is counted or allocated."""
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}; use a smaller one")


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`, naming the nearest one."""
    if value not in choices:
        raise ValueError(f"{what} must be {' or '.join(map(repr, choices))}, got {value!r}")


def transformed(*tensors: Tensor | None) -> bool:
    """Whether one of them is what a transform of torch.func hands to a function."""
    return any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def check_no_tangent(what: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError under forward-mode differentiation, where an operator without it would give zeros.

    Under torch.func's transforms, too, for which an operator says that a `setup_context` is missing.
    """
    if torch.compiler.is_compiling():
        return
    if transformed(*tensors):
        raise NotImplementedError(
            f"{what} has no torch.func transforms (grad, vmap, jvp); use impl='reference' or 'sdpa', or backward()"
        )
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{what} has no forward-mode derivative (torch.func.jvp); use impl='reference' or reverse mode"
            )

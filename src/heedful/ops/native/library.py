"""The compiled library of each scalar type: loaded once per process, checked once per build."""

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from heedful.ops.compiling import constant_result
from heedful.ops.native.build import Built, Unavailable, build

SCALARS = {torch.float32: "float", torch.float64: "double"}
_checks: list[Callable[[ctypes.CDLL, torch.dtype], tuple[dict[str, float], str]]] = []
_log = logging.getLogger("heedful")

_INTEGERS = (
    "batch heads groups length n_keys size v_size selectors select_size block tile threads every_key".split()  # noqa: SIM905
)

EXPANSION_WEIGHTS = "conv1 bias1 conv2 bias2 lin1 lin1_bias lin2 lin2_bias norm".split()  # noqa: SIM905


class SlotsJob(ctypes.Structure):
    """The arguments of one decoding step, as cpp/slots.h declares them."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("batch", "heads", "groups", "n_keys", "size", "v_size"),
                *("threads", "grace", "first", "subtract", "select_size"),
            )
        ),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        ("select_q", ctypes.c_void_p),
        ("select_k", ctypes.c_void_p),
        ("ss", ctypes.c_int64 * 3),
        ("qs", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64 * 3) for name in ("ks", "vs")),
        *((name, ctypes.c_void_p) for name in ("mask", "positions", "newest")),
        *((name, ctypes.c_int64) for name in ("ms", "ps")),
        *(
            (name, ctypes.c_void_p)
            for name in ("rows", "seen", "new_k", "new_v", "new_select_k", "own_votes")
        ),
        *((name, ctypes.c_int64 * 2) for name in ("nks", "nvs")),
        *((name, ctypes.c_int64) for name in ("nss", "budget", "ns")),
        *((name, ctypes.c_void_p) for name in ("out", "next", "parallel")),
    ]


class Job(ctypes.Structure):
    """The arguments of one call, as cpp/job.h declares them; tensors are held alive by the caller."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in ("scale", "select_scale")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64 * 3) for name in ("qs", "ks", "vs")),
        *(
            (name, ctypes.c_void_p)
            for name in ("select_q", "select_k", "real", "segments", "first", "start", "out")
        ),
        ("os", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("log_sum", "before", "after", "parallel", "grad_out")),
        ("gs", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("grad_after", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("d_select_q", "d_select_k", "d_start")),
    ]


class ExpandJob(ctypes.Structure):
    """The arguments of an expansion of SAS, as cpp/expand.h declares them."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in "batch length heads sim_heads size sim_size width threads norm_first".split()  # noqa: SIM905
        ),
        ("eps", ctypes.c_double),
        ("x", ctypes.c_void_p),
        ("xs", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in EXPANSION_WEIGHTS),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        ("rotation_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("out", "parallel", "grad")),
        ("gs", ctypes.c_int64 * 3),
        ("dx", ctypes.c_void_p),
        *((f"d_{name}", ctypes.c_void_p) for name in EXPANSION_WEIGHTS),
    ]


@dataclass(frozen=True)
class Status:
    """Whether the native operator of a dtype is active in this process."""

    active: bool
    reason: str
    """What it was built with, or why there is none and what to do."""
    path: str | None = None
    """The compiled library."""


@dataclass(frozen=True)
class Library:
    """A loaded library that passed its check."""

    handle: ctypes.CDLL
    built: Built


def check_with(check: Callable[[ctypes.CDLL, torch.dtype], tuple[dict[str, float], str]]) -> None:
    """Add to what a fresh build has to pass: the errors that were found, and why it is refused, or nothing."""
    _checks.append(check)


def status(dtype: torch.dtype = torch.float32) -> Status:
    """Whether `impl="native"` works here; compiles it if nobody did.

    Args:
        dtype: float64, or any other: 16 bits are computed in float32.
    """
    found = _find(SCALARS.get(dtype, "float"))
    if isinstance(found, str):
        return Status(False, found)
    return Status(True, f"compiled by {found.built.compiler}", str(found.built.path))


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The library for float32 or float64.

    Raises:
        Unavailable: where there is none; the message says why.
    """
    found = _find(SCALARS[dtype])
    if isinstance(found, str):
        raise Unavailable(f"the native operator is not available: {found}")
    return found.handle


def preferred(device_type: str, dtype: torch.dtype) -> bool:
    """Whether `impl="auto"` takes it for several queries: on the CPU where it can be had, but for float64."""
    return device_type == "cpu" and dtype != torch.float64 and usable()


@constant_result
def usable(scalar: str = "float") -> bool:
    """Whether `auto` may take it. Where it may not, that is said once, as a warning in the log."""
    return not isinstance(_find(scalar), str)


def check_native(q: Tensor) -> None:
    """Raise a ValueError that says why it cannot run."""
    if q.device.type not in ("cpu", "meta"):
        raise ValueError(f"impl='native' runs on the CPU, got tensors on {q.device}; use impl='auto'")
    reason = missing("double" if q.dtype == torch.float64 else "float")
    if reason:
        raise ValueError(f"impl='native' is not available: {reason}")


@constant_result
def missing(scalar: str) -> str:
    """Why there is no library, or nothing."""
    try:
        library(torch.float64 if scalar == "double" else torch.float32)
    except Unavailable as error:
        return str(error)
    return ""


@cache
def _find(scalar: str) -> Library | str:
    """The library, or why there is none."""
    if os.environ.get("HEEDFUL_NATIVE", "1") == "0":
        return "it is switched off by HEEDFUL_NATIVE=0"
    try:
        return _load(scalar)
    except Unavailable as error:
        _log.warning("heedful runs without its native operator: %s", error)
        return str(error)


def _load(scalar: str) -> Library:
    built = build(scalar)
    note = built.read_note()
    if note.get("refused"):
        raise Unavailable(f"{built.path.name} was refused: {note['refused']}; delete it to try again")
    try:
        handle = ctypes.CDLL(str(built.path))
        known = handle.heedful_job_bytes(), handle.heedful_slots_bytes(), handle.heedful_expand_bytes()
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{built.path} cannot be loaded: {error}") from error
    given = ctypes.sizeof(Job), ctypes.sizeof(SlotsJob), ctypes.sizeof(ExpandJob)
    if known != given:
        raise Unavailable(f"{built.path} expects {known} bytes of arguments, not {given}")
    if "errors" not in note:
        found = [check(handle, torch.float32 if scalar == "float" else torch.float64) for check in _checks]
        errors = {name: error for measured, _ in found for name, error in measured.items()}
        refused = "; ".join(why for _, why in found if why)
        built.write_note(errors=errors, torch=torch.__version__, **({"refused": refused} if refused else {}))
        if refused:
            raise Unavailable(f"{built.path.name} was refused: {refused}")
    return Library(handle, built)


@cache
def pool() -> int | None:
    """Address of the function that runs on the threads torch itself uses; a second pool would fight with them."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def address(x: Tensor | None) -> Any:
    """Where the numbers of a tensor are; None for none."""
    return None if x is None else x.data_ptr()

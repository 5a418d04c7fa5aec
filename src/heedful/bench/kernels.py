"""Attention alone, in every form that runs here: forward ("prefill"), and forward and backward ("train")."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from heedful.bench.forms import (
    COMPILED,
    FORGETTING,
    NAIVE,
    TWIN,
    X_TRANSFORMERS,
    Form,
    Unavailable,
    available,
    best_plain,
    check,
    forgetting,
    forgetting_reference,
    naive,
    named,
    ours,
    plain_reference,
    x_transformers,
)
from heedful.bench.workload import Case, Workload
from heedful.ops.native.library import preferred
from heedful.ops.selective import limits
from heedful.ops.selective.auto_rule import choose
from heedful.ops.selective.blocked import plain_blocked
from heedful.ops.selective.native.selective import plain_native
from heedful.ops.selective.triton.available import trusted

Work = Literal["prefill", "train"]

DENSE = {NAIVE, COMPILED, X_TRANSFORMERS, named("sdpa"), named("reference")}
"""Forms that keep T * T values."""

EVERY_KEY = "selective, every key"
"""The kernel for the CPU as if no key were ever voted away: its time does not depend on the inputs."""


@dataclass(frozen=True)
class Sizes:
    """The shape of the attention."""

    n_heads: int = 8
    n_kv_heads: int = 8
    head_dim: int = 64
    value_dim: int = 64
    batch: int = 1

    def draw(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Random q (B, H, T, D), k (B, G, T, D), v (B, G, T, E), the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        shapes = (
            (self.n_heads, self.head_dim),
            (self.n_kv_heads, self.head_dim),
            (self.n_kv_heads, self.value_dim),
        )
        q, k, v = (
            torch.randn(self.batch, heads, length, size, generator=generator).to(device, dtype)
            for heads, size in shapes
        )
        return q, k, v

    def flops(self, length: int, work: Work) -> float:
        """Of causal attention: two products over half the square forward, four more backward."""
        forward = self.batch * self.n_heads * length * (length + 1) * (self.head_dim + self.value_dim)
        return float(forward * (3 if work == "train" else 1))

    def bytes(self, length: int, work: Work, dtype: torch.dtype) -> float:
        """q, k, v read and the output written; in training the gradients of all four too."""
        keys = self.n_kv_heads * (self.head_dim + self.value_dim)
        values = self.batch * length * (self.n_heads * (self.head_dim + self.value_dim) + keys)
        return float(values * dtype.itemsize * (2 if work == "train" else 1))


class Kernels:
    """The forms that run here, checked once; `workload` binds them to a length.

    Args:
        sizes: of the attention.
        device: where to run.
        dtype: of q, k and v.
        compiled: include torch.compile of the naive form; on the CPU it needs a C++ compiler.

    Raises:
        RuntimeError: if a form of ours computes something else than its formula.
    """

    def __init__(
        self, sizes: Sizes, device: torch.device, dtype: torch.dtype, *, compiled: bool = True
    ) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype
        self.forms: dict[str, Form] = {}
        self.left_out: dict[str, str] = {}
        q, k, v = sizes.draw(67, device, dtype)
        self.kernels = trusted(q, v)
        tensors = [x.requires_grad_() for x in sizes.draw(512, device, dtype)]
        self.plain, form = best_plain(lambda form: trained(form, tensors[0], tensors[1], tensors[2]), device)
        self.forms[self.plain] = form
        reference = ours("reference")
        references = {TWIN: plain_reference, FORGETTING: forgetting_reference}
        mine = {TWIN: _twin(sizes, device, dtype)}
        usable, self.left_out = available(device, dtype)
        mine |= {named(impl): ours(impl) for impl in reversed(usable)}
        for name, form in mine.items():
            try:
                check(form, references.get(name, reference), q, k, v, gradients=True)
            except Unavailable as error:
                raise RuntimeError(f"{name} {error}") from None
            self.forms[name] = form
        for impl in ("native", "blocked"):
            if EVERY_KEY not in self.forms and named(impl) in self.forms:
                self.forms[EVERY_KEY] = self.forms[named(impl)]
        others: dict[str, Callable[[], Form]] = {
            NAIVE: lambda: naive,
            COMPILED: lambda: torch.compile(naive, dynamic=True),
            X_TRANSFORMERS: x_transformers,
            FORGETTING: lambda: forgetting(device),
        }
        if not compiled:
            del others[COMPILED]
            self.left_out[COMPILED] = "not asked for"
        for name, make in others.items():
            try:
                form = make()
                check(form, references.get(name, reference), q, k, v, gradients=True)
            except (Unavailable, torch._dynamo.exc.TorchDynamoException) as error:
                self.left_out[name] = str(error).strip().splitlines()[0]
            else:
                self.forms[name] = form

    def picked(self, length: int) -> str:
        """The case that `impl="auto"` picks."""
        if preferred(self.device.type, self.dtype):
            return named("native")
        return named(choose(self.device.type, length, length, self.kernels))

    def workload(self, work: Work, length: int, dense_up_to: int) -> Workload:
        """Every form at one length.

        Args:
            work: "prefill", forward without gradients, or "train", forward and backward.
            length: T.
            dense_up_to: the longest T at which all forms that keep T * T values take part; beyond it
                x-transformers stands for them.
        """
        left_out = dict(self.left_out)
        q, k, v = self.sizes.draw(length, self.device, self.dtype)
        if work == "train":
            q, k, v = (x.requires_grad_() for x in (q, k, v))
        bind = trained if work == "train" else read
        flops, moved = self.sizes.flops(length, work), self.sizes.bytes(length, work, self.dtype)
        cases = []
        for name, form in self.forms.items():
            if name == named("reference") != self.picked(length):
                continue  # the naive form is the same, without its checks
            if name in DENSE - {X_TRANSFORMERS} and length > dense_up_to:
                left_out[name] = f"keeps T*T values; --dense-up-to {length} includes it"
                continue
            run = bind(form, q, k, v)
            cases.append(Case(name, with_every_key(run) if name == EVERY_KEY else run, flops, moved))
        return Workload(
            name=work,
            length=length,
            tokens=self.sizes.batch * length,
            cases=cases,
            baselines={"vs SDPA": self.plain, "vs twin": TWIN},
            left_out=left_out,
        )


def with_every_key(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same, but no block of queries leaves keys out."""

    def kept() -> Any:
        share, limits.MANY = limits.MANY, 0.0
        try:
            return run()
        finally:
            limits.MANY = share

    return kept


def read(form: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Forward alone, without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return form(q, k, v)

    return run


def trained(
    form: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, parameters: Sequence[Tensor] = ()
) -> Callable[[], Any]:
    """Forward, and backward to q, k, v and the parameters."""
    with torch.no_grad():
        gradient = torch.randn_like(form(q, k, v))
    inputs = [q, k, v, *parameters]
    return lambda: torch.autograd.grad(form(q, k, v), inputs, gradient)


def _twin(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Form:
    twin = plain_native if preferred(device.type, dtype) else plain_blocked
    return lambda q, k, v: twin(q, k, v, sizes.head_dim**-0.5)

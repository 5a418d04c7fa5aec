"""Ways to compute causal attention, ours and others', as functions of q, k and v."""

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from heedful.bench.timing import interleaved
from heedful.ops.dot_product import attention_reference, repeat_kv
from heedful.ops.masks import visible_keys
from heedful.ops.selective import selective_attention
from heedful.ops.selective.api import IMPLEMENTATIONS

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B, H, T, D), k (B, G, T, D), v (B, G, T, E) -> (B, H, T, E)."""

TWIN = "no-selection twin"
NAIVE = "naive"
COMPILED = "naive, torch.compile"
X_TRANSFORMERS = "x-transformers"
FORGETTING = "fla, forgetting"

CUDA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Unavailable(Exception):
    """A form cannot run here, or computes something else; the message says why, and what to do."""


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention; narrower values are padded, since its fused kernels want one size."""
    wide = max(q.shape[-1], v.shape[-1])
    size, scale = v.shape[-1], q.shape[-1] ** -0.5
    q, k, v = (F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x for x in (q, k, v))
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)[..., :size]


def with_backend(form: Form, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`form` with one backend of scaled_dot_product_attention allowed."""
    with sdpa_kernel(backend):
        return form(q, k, v)


def best_plain(run: Callable[[Form], Callable[[], object]], device: torch.device) -> tuple[str, Form]:
    """The fastest backend of PyTorch's attention on this device: its name and the form.

    Args:
        run: makes of a form what is timed.
        device: the CPU has one fused backend, which PyTorch takes by itself.
    """
    if device.type != "cuda":
        return "plain SDPA", plain
    forms = {name: partial(with_backend, plain, backend) for name, backend in CUDA_BACKENDS.items()}
    usable = {}
    for name, form in forms.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each backend says at length why it does not fit
            try:
                run(form)()
            except RuntimeError:
                continue
        usable[name] = form
    if not usable:
        return "plain SDPA", plain
    timings = interleaved({name: run(form) for name, form in usable.items()}, turns=5, device=device)
    fastest = min(timings.values(), key=lambda t: t.seconds).name
    return f"plain SDPA, {fastest}", usable[fastest]


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Selective attention as one writes it down, every logit in memory."""
    length, heads = q.shape[2], q.shape[1]
    k, v = repeat_kv(k, heads), repeat_kv(v, heads)
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    votes = logits[:, :1].masked_fill(hidden, 0.0).relu()
    votes = votes * (1 - torch.eye(length, device=q.device))
    votes = F.pad(votes[..., 1:], (1, 0))
    masks = F.pad(votes.cumsum(-2)[..., :-1, :], (0, 0, 1, 0))
    weights = (logits - masks).masked_fill(hidden, -torch.inf).softmax(-1)
    return weights.to(v.dtype) @ v


def ours(impl: str) -> Form:
    """`selective_attention` with one implementation."""
    return lambda q, k, v: selective_attention(q, k, v, impl=impl)[0]


def named(impl: str) -> str:
    """How an implementation of ours is called in tables."""
    return f"selective, {impl}"


def available(device: torch.device, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """The implementations of `selective_attention` that run here, and why the others do not."""
    usable, left_out = [], {}
    tiny = torch.zeros(1, 2, 16, 32, device=device, dtype=dtype)
    for impl in IMPLEMENTATIONS:
        if impl == "triton" and device.type == "cpu":
            continue  # with TRITON_INTERPRET=1 it runs, and its time means nothing
        try:
            ours(impl)(tiny, tiny, tiny)
        except ValueError as error:
            left_out[named(impl)] = str(error)
        else:
            usable.append(impl)
    return usable, left_out


def x_transformers() -> Form:
    """The attention core of x-transformers with `attn_selective=True`.

    Raises:
        Unavailable: if it is not installed.
    """
    if importlib.util.find_spec("x_transformers") is None:
        raise Unavailable('not installed; pip install "heedful[bench]"')
    from x_transformers.attend import Attend

    attend = Attend(causal=True, selective=True)
    # its groups of heads are ordered otherwise than ours
    return lambda q, k, v: attend(q, repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1]))[0]


def forgetting(device: torch.device) -> Form:
    """Forgetting attention of flash-linear-attention: the nearest relative, one gate per token.

    Raises:
        Unavailable: where there is no CUDA device, or if it is not installed.
    """
    if device.type != "cuda":
        raise Unavailable("its kernels need a CUDA device")
    if importlib.util.find_spec("fla") is None:
        raise Unavailable("not installed; pip install flash-linear-attention")
    from fla.ops.forgetting_attn import parallel_forgetting_attn

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens_first = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return parallel_forgetting_attn(*tokens_first, gates(q)).transpose(1, 2)

    return run


def gates(q: Tensor) -> Tensor:
    """Log gates of forgetting attention, (B, T, H) float32: the same 0.98 everywhere."""
    batch, heads, length, _ = q.shape
    return torch.full((batch, length, heads), 0.98, device=q.device).log()


def forgetting_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(L + G_i - G_j) v with G the cumulated log gates (Lin et al., arXiv 2503.02130)."""
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    cumulated = gates(q).to(q.dtype).cumsum(1).transpose(1, 2)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    logits = logits + cumulated[..., :, None] - cumulated[..., None, :]
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def plain_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention, every logit in memory."""
    visible = visible_keys(q.shape[2], k.shape[2], None, None, q.device)
    return attention_reference(q, k, v, visible, q.shape[-1] ** -0.5)


def check(form: Form, reference: Form, q: Tensor, k: Tensor, v: Tensor, *, gradients: bool) -> None:
    """Compare a form with its formula in float64, so that what is timed computes what it says.

    Args:
        form: the function.
        reference: its formula.
        q: (B, H, T, D).
        k: (B, G, T, D).
        v: (B, G, T, E).
        gradients: compare those of q, k and v too.

    Raises:
        Unavailable: if they differ by more than 1e-4 (bf16 and fp16: 5e-2) of the largest value.
    """
    allowed = 1e-4 if q.dtype.itemsize >= 4 else 5e-2
    want = _outputs(reference, [x.double() for x in (q, k, v)], gradients)
    got = _outputs(form, [q, k, v], gradients)
    for name, a, b in zip(("output", "gradient of q", "of k", "of v"), got, want, strict=False):
        error = float((a.double() - b).abs().max() / b.abs().max())
        if not error <= allowed:
            raise Unavailable(f"computes something else: {name} is off by {error:.1g} in {q.dtype}")


def _outputs(form: Form, inputs: list[Tensor], gradients: bool) -> list[Tensor]:
    if not gradients:
        with torch.no_grad():
            return [form(*inputs)]
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = form(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights.to(out.dtype))]

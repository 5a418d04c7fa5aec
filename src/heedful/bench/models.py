"""Whole language models: a training step, and reading a prompt."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from heedful.attention.params import param_groups
from heedful.bench.workload import Case, Workload
from heedful.hf import HeedfulConfig, HeedfulForCausalLM
from heedful.hf.cache import HeedfulCache

MHA = "MHA softmax"
SELECTIVE = "selective"
MEMORY_LOSS = "selective, memory loss"
SAS = "SAS"
SAS_SELECTIVE = "SAS x selective"

FORMS: Mapping[str, dict[str, Any]] = {
    MHA: {},
    SELECTIVE: {"score": "selective"},
    MEMORY_LOSS: {"score": "selective", "score_options": {"memory_loss": 0.1}},
    SAS: {"attention": "sas"},
    SAS_SELECTIVE: {"attention": "sas", "score": "selective"},
}
"""SAS with its defaults: 3x heads, 1.5x features."""

STEP = "training step"
COMPILED = ", compiled"
"""At the end of the name of a case that runs under torch.compile."""


@dataclass(frozen=True)
class ModelSizes:
    """The shape of the model."""

    n_layers: int = 6
    d_model: int = 512
    n_heads: int = 8
    vocab_size: int = 8192
    batch: int = 1

    def config(self, length: int, **form: Any) -> HeedfulConfig:
        """Of a form in `FORMS`, for texts of `length` tokens."""
        return HeedfulConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            max_position_embeddings=length,
            **form,
        )

    def build(self, length: int, device: torch.device, dtype: torch.dtype, **form: Any) -> torch.nn.Module:
        """The model of a form, the same weights every time."""
        torch.manual_seed(0)
        model: torch.nn.Module = HeedfulForCausalLM(self.config(length, **form))
        return model.to(device, dtype)

    def flops(self, length: int, *, context: int, logits: int, **form: Any) -> float:
        """Of one forward pass over the batch.

        Args:
            length: T.
            context: keys that a query sees, on average.
            logits: positions whose logits are computed.
            **form: of the model.
        """
        per_token = self.config(length, **form).to_decoder_config().flops_per_token(context)
        head = 2 * self.vocab_size * self.d_model
        return float(self.batch * (per_token * length - head * (length - logits)))

    def ids(self, length: int, device: torch.device) -> torch.Tensor:
        """Random tokens (B, T), the same every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocab_size, (self.batch, length), generator=generator).to(device)


def train_workload(
    length: int,
    sizes: ModelSizes,
    device: torch.device,
    dtype: torch.dtype,
    forms: Sequence[str] = tuple(FORMS),
    *,
    compiled: bool = False,
) -> Workload:
    """Training steps: forward, backward and AdamW.

    Args:
        length: T.
        sizes: of the model.
        device: where to run.
        dtype: float32, or what autocast computes in; the weights are float32.
        forms: names in `FORMS`; the first one, plain attention, is the baseline.
        compiled: each form under torch.compile as well; its first run compiles.
    """
    ids = sizes.ids(length, device)
    cases = []
    for name in forms:
        model = sizes.build(length, device, torch.float32, **FORMS[name]).train()
        n = sum(p.numel() for p in model.parameters())
        # AdamW reads the weight, its gradient and two moments, and writes all but the gradient
        moved = 7.0 * n * torch.float32.itemsize
        flops = 3 * sizes.flops(length, context=-(-length // 2), logits=length, **FORMS[name])
        cases.append(Case(name, _train_step(model, ids, dtype), flops, moved))
        if compiled:
            model = sizes.build(length, device, torch.float32, **FORMS[name]).train()
            run = _train_step(model, ids, dtype, torch.compile(model))
            cases.append(Case(name + COMPILED, run, flops, moved))
    return Workload(
        name=STEP,
        length=length,
        tokens=ids.numel(),
        cases=cases,
        baselines={"vs MHA": forms[0]},
    )


def _train_step(
    model: torch.nn.Module,
    ids: torch.Tensor,
    dtype: torch.dtype,
    forward: Callable[..., Any] | None = None,
) -> Callable[[], torch.Tensor]:
    forward = model if forward is None else forward
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-4)
    mixed = dtype != torch.float32

    def step() -> torch.Tensor:
        with torch.autocast(ids.device.type, dtype) if mixed else nullcontext():
            loss = forward(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def model_prefill_workload(
    length: int, budget: int, sizes: ModelSizes, device: torch.device, dtype: torch.dtype
) -> Workload:
    """Reading a prompt up to the logits of the next token, with the cache that decoding goes on from.

    Args:
        length: T.
        budget: tokens that the caches of the pruned case hold.
        sizes: of the model.
        device: where to run.
        dtype: of the weights.
    """
    ids = sizes.ids(length, device)
    pruned = f"selective, budget {budget}"
    kinds: dict[str, tuple[str, int | None]] = {
        MHA: (MHA, None),
        SELECTIVE: (SELECTIVE, None),
        pruned: (SELECTIVE, budget),
    }
    cases = []
    for name, (form, held) in kinds.items():
        model = sizes.build(length, device, dtype, **FORMS[form]).eval()
        weights = sum(p.numel() for p in model.parameters())
        context = min(-(-length // 2), held or length)
        flops = sizes.flops(length, context=context, logits=1, **FORMS[form])
        cases.append(
            Case(name, _reading(model, sizes.n_layers, ids, held), flops, float(weights * dtype.itemsize))
        )
    return Workload(
        name="whole model",
        length=length,
        tokens=ids.numel(),
        cases=cases,
        baselines={"vs MHA": MHA},
    )


def _reading(
    model: torch.nn.Module, n_layers: int, ids: torch.Tensor, budget: int | None
) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        cache = HeedfulCache(n_layers, "full" if budget is None else budget)
        with torch.no_grad():
            return model(ids, past_key_values=cache, logits_to_keep=1).logits

    return run

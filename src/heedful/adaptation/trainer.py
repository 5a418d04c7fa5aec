"""`Trainer` for the two stages of an adaptation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from heedful.adaptation.learning import SHARE, Forgetting, learning_layers, local_losses
from heedful.evaluation.loss import divergence, measuring
from heedful.ops.eviction import Rule
from heedful.training.checkpoint import write_checksums
from heedful.training.divergence import diverged

WEIGHTS = "model.safetensors"


class AdaptTrainer(Trainer):
    """Saves what it trains alone: a checkpoint of a stage has the size of its selectors or of its LoRA."""

    measure: Callable[[], float]
    """The KL to the source on validation text, measured in between."""

    rate_flag: str
    """What sets its learning rate."""

    @property
    def _own(self) -> Any:
        return self.model

    def check(self, loss: torch.Tensor) -> None:
        """Raise for a loss that is not finite; Trainer would log the mean of those before, and train on."""
        if not torch.isfinite(loss):
            advice = f"try a lower {self.rate_flag} than {self.args.learning_rate:g}"
            raise diverged(f"at step {self.state.global_step + 1}", f"the loss is {float(loss)}", advice)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What `measure` finds."""
        metrics = {"eval_kl": self.measure()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_trained(self, folder: Path, state: dict[str, Any] | None = None) -> None:
        """Write what is trained; `state`: gathered from all processes."""
        folder.mkdir(parents=True, exist_ok=True)
        names = self._trained()
        state = self._own.state_dict() if state is None else state
        save_file({name: state[name].detach().cpu().contiguous() for name in names}, folder / WEIGHTS)

    def load_trained(self, folder: Path) -> None:
        """Read what `save_trained` wrote.

        Raises:
            ValueError: if it is of another model.
        """
        state = load_file(folder / WEIGHTS)
        own = {name: p.shape for name, p in self._own.named_parameters() if name in self._trained()}
        if {name: t.shape for name, t in state.items()} != own:
            raise ValueError("it is of another model: its weights have other names or shapes")
        self._own.load_state_dict(state, strict=False)

    def _trained(self) -> set[str]:
        return {name for name, p in self._own.named_parameters() if p.requires_grad}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and folder.is_dir():
            write_checksums(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.save_trained(Path(output_dir or str(self.args.output_dir)), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_trained(Path(resume_from_checkpoint))


class LocalTrainer(AdaptTrainer):
    """The first stage: every layer's selectors learn from what the layer itself does. No pass backward."""

    rate_flag = "--lr"
    grace: int
    first: int

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The sum over layers of their local losses, in bf16 too a float32."""
        with local_losses(self.accelerator.unwrap_model(model), grace=self.grace, first=self.first) as losses:
            output = model(inputs["input_ids"], use_cache=False, logits_to_keep=1)
        loss = torch.stack(losses).sum()
        self.check(loss)
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The loss of a layer, not that of all."""
        if "loss" in logs:
            logs["loss"] /= len(learning_layers(self._own))
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Adam, whose steps are as large for each weight as `start_selectors` made it."""
        own, rate = model or self._own, self.args.learning_rate
        groups = []
        for layer, size in zip(learning_layers(own), self.sizes, strict=True):
            score = layer.score
            if score.config.selector == "retention":
                first, _, last = score.retain
                groups.append({"params": [first.weight], "lr": rate / size})
                groups.append({"params": [first.bias, *last.parameters()], "lr": rate})
                continue
            for linear, share in ((score.select_q, SHARE), (score.select_k, 1)):
                groups.append({"params": [linear.weight], "lr": rate / (size * share)})
                groups.append({"params": [linear.bias], "lr": rate / share})
        self.optimizer = torch.optim.Adam(groups, lr=rate)
        return self.optimizer

    sizes: list[float]
    """`input_sizes`."""


class DistillTrainer(AdaptTrainer):
    """The second stage: LoRA learns to predict under eviction what the model predicts with every token."""

    rate_flag = "--lora-lr"
    forgetting: Forgetting
    """At work on the model."""
    rules: list[Rule]
    """Steps take turns with them."""

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The KL of the next token, nats per token."""
        ids, peft = inputs["input_ids"], self.accelerator.unwrap_model(model)
        with measuring(peft), peft.disable_adapter(), self.forgetting.remembering():
            taught = model(ids, use_cache=False).logits
        # stays for the pass backward, which may compute the layers again
        self.forgetting.rule = self.rules[self.state.global_step % len(self.rules)]
        output = model(ids, use_cache=False)
        loss = divergence(taught, output.logits) / ids.numel()
        self.check(loss)
        return (loss, output) if return_outputs else loss

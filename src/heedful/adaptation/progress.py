"""What a person sees while a model adapts."""

import time
from typing import Any

from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from heedful.training.progress import ProgressCallback

TITLES = {
    "local": "selectors, layer by layer",
    "distill": "LoRA against the source",
}


class AdaptProgress(ProgressCallback):
    """A bar, or plain lines, with the loss of the stage, and what it comes to: the KL of a small cache.

    Args:
        stage: "local" or "distill".
        held: what the small cache holds, for people.
        tokens_per_step: to show tokens per second.
        console: where to draw.
    """

    def __init__(self, stage: str, held: str, tokens_per_step: int, console: Console) -> None:
        super().__init__(TITLES[stage], tokens_per_step, console)
        self.held = held

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "eval_kl" in logs:
            self._line(state, f"KL to the source {logs['eval_kl']:.4f} with {self.held}")
        elif "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"
            if self.bar is None and time.perf_counter() - self.last_line > 10:
                self._line(state, self._info(state))

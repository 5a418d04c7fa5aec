"""What a person sees while a model adapts."""

from rich.console import Console

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

    def measured(self, logs: dict[str, float]) -> str | None:
        """The KL of a small cache."""
        if "eval_kl" not in logs:
            return None
        return f"KL to the source {logs['eval_kl']:.4f} with {self.held}"

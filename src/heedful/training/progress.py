"""What a person sees while a model trains, and what Ctrl-C does."""

import json
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from heedful.files import write_text
from heedful.screen import progress_bar


class ProgressCallback(TrainerCallback):
    """A progress bar with the losses; plain lines where the output is no terminal.

    Args:
        title: what is being trained.
        tokens_per_step: to show tokens per second.
        console: where to draw.
        brief: for one run of many: a bar that vanishes, and without a terminal a line a minute.
    """

    def __init__(self, title: str, tokens_per_step: int, console: Console, brief: bool = False) -> None:
        self.title = title
        self.brief = brief
        self.tokens_per_step = tokens_per_step
        self.console = console
        self.loss = ""
        self.bar: Progress | None = None
        self.last_line = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        if self.brief:
            self.last_line = self.started
        if self.console.is_terminal:
            self.bar = progress_bar(self.console, "info", transient=self.brief)
            self.task = self.bar.add_task(
                self.title, total=state.max_steps, completed=state.global_step, info=""
            )
            self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, info=self._info(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if (measured := self.measured(logs)) and not self.brief:
            self._line(state, measured)
        elif "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"
            if "memory_loss" in logs:
                self.loss += f", of it memory {logs['memory_loss']:.3f}"
            if self.bar is None and time.perf_counter() - self.last_line > (60 if self.brief else 10):
                self._line(state, self._info(state))

    def measured(self, logs: dict[str, float]) -> str | None:
        """What an evaluation found, for people; None where the logs are of none."""
        if "eval_loss" not in logs:
            return None
        return f"validation loss {logs['eval_loss']:.3f}, next token right {logs['eval_accuracy']:.1%}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _info(self, state: TrainerState) -> str:
        seconds = time.perf_counter() - self.started
        speed = (state.global_step - self.first_step) * self.tokens_per_step / max(seconds, 1e-9)
        return f"{self.loss}  {speed:,.0f} tokens/s"

    def _line(self, state: TrainerState, text: str) -> None:
        self.last_line = time.perf_counter()
        line = f"{self.title}  step {state.global_step}/{state.max_steps}  {text}"
        self.console.print(line, soft_wrap=True)


class StepTimer(TrainerCallback):
    """Measures how long the optimizer steps take, without evaluation and saving."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begun: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.begun is not None
        self.seconds.append(time.perf_counter() - self.begun)

    @property
    def median(self) -> float:
        """Median seconds of a step; the first, which warms up, does not count."""
        steps = sorted(self.seconds[1:] or self.seconds)
        return steps[len(steps) // 2] if steps else float("nan")


class LogFile(TrainerCallback):
    """Writes what Trainer logs, a line per entry, at every evaluation, checkpoint and end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
            write_text(self.path, lines)

    on_save = on_train_end = on_evaluate


class StopOnCtrlC(TrainerCallback):
    """The first Ctrl-C finishes the step, saves a checkpoint and stops; the second stops at once."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> "StopOnCtrlC":
        self.in_main = threading.current_thread() is threading.main_thread()
        if self.in_main:
            self.before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        if self.in_main:
            signal.signal(signal.SIGINT, self.before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pressed:
            control.should_save = True
            control.should_training_stop = True
        if state.global_step >= state.max_steps:
            # The model itself is saved next; Trainer would take one more step from a checkpoint here.
            control.should_save = False

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        print("\nfinishing this step and saving a checkpoint; Ctrl-C again stops at once", file=sys.stderr)

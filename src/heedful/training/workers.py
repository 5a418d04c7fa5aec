"""Several models at a time, one process each: small models use one core well and two badly."""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from heedful.errors import Interrupted
from heedful.forms import load_forms
from heedful.screen import progress_bar

QUIET_SECONDS = 10.0
"""Where the output is no terminal, a model says at most this often how far it is."""

ALL_SHOWN = 8
"""As many bars stay on the screen; of more jobs only those that run have one."""

# Of a worker process, which gets both when it begins.
_messages: Any = None
_stopped: Any = None
_parent = 0


class NotBegun(Interrupted):
    """A job that was stopped while nothing of it had been done."""


class Job(Protocol):
    """Something that can be handed to another process."""

    @property
    def title(self) -> str:
        """What it is called."""
        ...

    @property
    def steps(self) -> int:
        """Steps of training."""
        ...

    def run(self, console: Console, callbacks: Sequence[TrainerCallback]) -> Any:
        """Do it, and return what can be handed back."""
        ...


def side_by_side(
    jobs: Sequence[Job],
    console: Console,
    workers: int | None = None,
    done: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """Run the jobs, several at a time, and return what they return, in order.

    Args:
        jobs: in the order in which they begin.
        console: where their progress is shown.
        workers: processes; default: one per core that torch uses. The cores are shared out among them. One
            worker is this process itself.
        done: called with the number of each job that has ended, and with what it returned.

    Raises:
        Interrupted: after Ctrl-C, when every job that was running has saved a checkpoint.
        RuntimeError: if a worker process was killed.
        Exception: what the first failed job raised; jobs that are running finish their step and save.
    """
    cores = torch.get_num_threads()
    workers = min(len(jobs), cores if workers is None else workers)
    if workers <= 1:
        return [_alone(number, job, console, done) for number, job in enumerate(jobs)]
    context = multiprocessing.get_context("spawn")
    messages, stop = context.Queue(), context.Event()
    initial = (messages, stop, max(1, cores // workers))
    with ProcessPoolExecutor(workers, context, _begin, initial) as pool:
        with _ignoring_ctrl_c():  # inherited by the processes, until a Trainer listens in one
            futures = [pool.submit(_work, number, job) for number, job in enumerate(jobs)]
        with _on_ctrl_c(lambda: _stop(stop, futures)):
            _watch(jobs, futures, messages, console, done)
            failed = [f for f in futures if not f.cancelled() and f.exception() is not None]
            if failed and not stop.is_set():
                _stop(stop, futures)
    errors = [f.exception() for f in failed]
    others = [e for e in errors if not isinstance(e, Interrupted | KeyboardInterrupt)]
    if others:
        assert others[0] is not None
        if isinstance(others[0], BrokenProcessPool):
            raise RuntimeError(
                "a worker process was killed, from outside or for want of memory; what had ended is kept, the same "
                "command goes on, and fewer --workers need less memory"
            ) from others[0]
        raise others[0]
    if errors or any(f.cancelled() for f in futures):
        began = any(not isinstance(e, NotBegun) for e in errors)
        saved = "with a checkpoint of every model that was training" if began else "before any model trained"
        raise Interrupted(f"stopped, {saved}")
    return [f.result() for f in futures]


def _alone(number: int, job: Job, console: Console, done: Callable[[int, Any], None] | None) -> Any:
    """A job in this process."""
    result = job.run(console, ())
    if done is not None:
        done(number, result)
    return result


class Report(TrainerCallback):
    """Tells the parent how far training is, and hears when to stop."""

    def __init__(self, number: int, messages: Any, stop: Any) -> None:
        self.number, self.messages, self.stop = number, messages, stop
        self.stopping = self.pressed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stop.is_set():  # Ctrl-C came while this process was not listening yet
            os.kill(os.getpid(), signal.SIGINT)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.messages.put((self.number, state.global_step, ""))
        orphaned = os.getppid() != _parent  # it was killed, and nobody waits: save and stop
        if (orphaned or self.stopping) and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)
        # A Ctrl-C in a terminal has reached this process, too, and ends it with this step: a second would at once.
        self.stopping = self.stop.is_set()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss, right = (metrics or {}).get("eval_loss"), (metrics or {}).get("eval_accuracy")
        self.messages.put((self.number, state.global_step, f"loss {loss:.3f}, right {right:.1%}"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            self.messages.put((self.number, state.global_step, "trained; measuring"))


def _begin(messages: Any, stop: Any, threads: int) -> None:
    """In a new process, before its first job."""
    global _messages, _stopped, _parent
    _messages, _stopped, _parent = messages, stop, os.getppid()
    torch.set_num_threads(threads)
    load_forms()


def _work(number: int, job: Job) -> Any:
    """In another process: one job."""
    if _stopped.is_set():
        raise NotBegun("stopped before it began")
    try:
        return job.run(Console(quiet=True), [Report(number, _messages, _stopped)])
    finally:
        if os.getppid() != _parent:  # nobody takes the result, and the next job never comes
            os._exit(1)


def _stop(stop: Any, futures: Sequence[Future[Any]]) -> None:
    stop.set()
    for future in futures:
        future.cancel()


def _watch(
    jobs: Sequence[Job],
    futures: Sequence[Future[Any]],
    messages: Any,
    console: Console,
    done: Callable[[int, Any], None] | None,
) -> None:
    """Show what the processes report until all are done or one has failed."""
    said = [0.0] * len(jobs)
    told: set[int] = set()
    few = len(jobs) <= ALL_SHOWN
    with progress_bar(console, "info", transient=not few) as bars:
        tasks = [bars.add_task(job.title, total=job.steps, info="waiting", visible=few) for job in jobs]

        def tell() -> None:
            for number, future in enumerate(futures):
                if (
                    number in told
                    or not future.done()
                    or future.cancelled()
                    or future.exception() is not None
                ):
                    continue
                told.add(number)
                bars.update(tasks[number], completed=jobs[number].steps, info="done", visible=few)
                if done is not None:
                    done(number, future.result())

        while not all(f.done() for f in futures):
            tell()
            try:
                number, step, info = messages.get(timeout=0.2)
            except queue.Empty:
                if any(f.done() and not f.cancelled() and f.exception() is not None for f in futures):
                    return
                continue
            job = jobs[number]
            if number not in told:
                bars.update(tasks[number], completed=step, visible=True, **({"info": info} if info else {}))
            quiet = QUIET_SECONDS if few else 6 * QUIET_SECONDS
            if not console.is_terminal and ((info and few) or time.perf_counter() - said[number] > quiet):
                said[number] = time.perf_counter()
                console.print(f"{job.title}  step {step}/{job.steps}  {info}".rstrip(), highlight=False)
        tell()


@contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    with _on_ctrl_c(None):
        yield


@contextmanager
def _on_ctrl_c(action: Callable[[], None] | None) -> Iterator[None]:
    """The first Ctrl-C runs `action`, the second stops at once; None ignores it. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        assert action is not None
        action()

    before = signal.signal(signal.SIGINT, signal.SIG_IGN if action is None else press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

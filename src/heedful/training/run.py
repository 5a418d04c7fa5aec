"""One training run: data, model, Trainer, and the files it leaves."""

import contextlib
import errno
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback as TqdmCallback

from heedful.attention.params import decayed_names
from heedful.data import Data, TokenDataset, load_data
from heedful.data.dataset import SYNTHETIC_VALIDATION_SEED
from heedful.decoder import DecoderConfig
from heedful.errors import Interrupted
from heedful.evaluation import Evaluation, evaluate
from heedful.files import folder_locked, holds_something
from heedful.hf.modeling import HeedfulForCausalLM, HeedfulOutput
from heedful.hf.saved import write_beside
from heedful.machine import memory_bytes
from heedful.screen import spinner
from heedful.training.checkpoint import check_checksums, last_checkpoint, write_checksums
from heedful.training.divergence import advice_for, diverged, lost_terms
from heedful.training.progress import LogFile, ProgressCallback, StepTimer, StopOnCtrlC
from heedful.training.result import RunResult
from heedful.training.settings import SETTINGS, TrainSettings

RESULT, CHECKPOINTS, LOG = "result.json", "checkpoints", "log.jsonl"
LENGTHS = (2, 4)
"""Held-out lengths of a synthetic task, in lengths of training."""
LONGER_EXAMPLES, LONGER_TOKENS, LEAST_EXAMPLES = 256, 2**19, 32
"""Sequences of those lengths, fewer of so many tokens, but some in any case."""


class LanguageModelTrainer(Trainer):
    """`Trainer` with heedful's weight decay rule, its evaluation over tokens, and a log of the memory loss."""

    resumed = False
    """Whether it goes on from a checkpoint."""
    _last: HeedfulOutput | None = None
    _mask: torch.Tensor | None = None

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The model's own loss; its memory loss is remembered for the log.

        Raises:
            ValueError: for a loss that is not finite: the weights are still those of the step before.
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        memory = outputs.get("memory_loss")
        # Trainer would log the mean of the losses before, and train on
        if (lost := lost_terms(loss, outputs["logits"], memory)) is not None:
            raise diverged(f"at step {self.state.global_step + 1}", lost, self.advice(memory))
        if memory is not None:
            # not the logits: they would be held beside those of the next batch
            kept = {name: outputs[name] for name in ("memory_loss", "kept_tokens")}
            self._last, self._mask = HeedfulOutput(**kept), inputs.get("attention_mask")
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the memory loss of the last batch, and the tokens kept per layer in it.

        Raises:
            ValueError: for gradients whose norm is not finite: they were clipped to nothing, or to NaN.
        """
        norm = logs.get("grad_norm")
        if norm is not None and not math.isfinite(norm):
            what = f"the norm of the gradients is {norm}"
            raise diverged(f"at step {self.state.global_step}", what, self.advice())
        if "loss" in logs and self._last is not None:
            logs.update(memory_logs(self._last, self._mask))
        if self.resumed:  # Trainer's is the mean since then, and its name says otherwise
            logs.pop("train_loss", None)
        super().log(logs, *args, **kwargs)

    def advice(self, memory_loss: torch.Tensor | None = None) -> str:
        """What to change if training diverged, and what is left of it."""
        options = getattr(getattr(self.model, "config", None), "score_options", None)
        advice = advice_for(self.args.learning_rate, self.args.weight_decay, options, memory_loss)
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
        return advice if checkpoint is None else f"{advice}; {checkpoint} holds the weights before"

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, but never weights that are lost: the last good checkpoint stays."""
        assert self.model is not None
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise diverged(f"at step {self.state.global_step}", "weights are not finite", self.advice())
        super()._save_checkpoint(*args, **kwargs)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and folder.is_dir():
            write_checksums(folder)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """No decay on norms, biases and SAS's identity part."""
        return decayed_names(model)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validation loss (nats/token) and accuracy on labelled tokens.

        Raises:
            ValueError: for a loss that is not finite.
        """
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        assert isinstance(rows, TokenDataset) and self.model is not None
        with self.compute_loss_context_manager():
            result = evaluate(self.model, rows, batch_size=self.args.eval_batch_size)
        if not math.isfinite(result.loss):
            what = f"the validation loss is {result.loss}"
            raise diverged(f"at step {self.state.global_step}", what, self.advice())
        metrics = {
            f"{metric_key_prefix}_loss": result.loss,
            f"{metric_key_prefix}_accuracy": result.accuracy,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def memory_logs(output: HeedfulOutput, mask: torch.Tensor | None = None) -> dict[str, float]:
    """The memory loss as it enters the loss, and mean and 95th percentile of the tokens kept, by layer.

    Args:
        output: of a forward in training mode, with a memory loss.
        mask: (B, T) attention mask, 0 = padding, which is not counted.
    """
    assert output.memory_loss is not None and output.kept_tokens is not None
    logs = {"memory_loss": float(output.memory_loss)}
    for layer, kept in enumerate(output.kept_tokens):
        real = (kept if mask is None else kept[mask.bool()]).flatten().float()
        logs[f"kept_mean_{layer}"] = float(real.mean())
        logs[f"kept_p95_{layer}"] = float(real.kthvalue(max(1, round(0.95 * real.numel()))).values)
    return logs


def train(
    settings: TrainSettings,
    out: str | Path,
    *,
    resume: bool = False,
    data: Data | None = None,
    console: Console | None = None,
    title: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Train a model and leave it, with its settings and figures, in a folder.

    The folder loads with `AutoModelForCausalLM.from_pretrained` once `heedful.hf` is imported. Every
    checkpoint holds weights, optimizer, schedule and random state, so that a resumed run continues exactly.

    Args:
        settings: what to train.
        out: the folder; made if missing. It must not hold a run already unless `resume`.
        resume: go on from the last checkpoint of a run with these settings.
        data: loaded data, to share it between runs; default: what the settings name.
        console: where to show progress.
        title: what the progress of one run among many is called; then it takes little room.
        callbacks: more of Trainer's callbacks.

    Returns:
        The figures, also in `out/result.json`; `out/log.jsonl` has the losses while training.

    Raises:
        ValueError: if the settings, the data or a checkpoint are unsound.
        FileExistsError: if `out` holds a run and `resume` is False, or holds other files.
        Interrupted: after Ctrl-C; `resume=True` goes on.
        Locked: if another process trains in `out`.
        OSError: if `out` cannot be written.
    """
    _, first = _processes()
    out, console = Path(out), console or Console(stderr=True, quiet=not first)
    if resume and (out / RESULT).exists():
        check_same_settings(settings, out)
        result = RunResult.load(out / RESULT)
        if first:  # it may have been killed between its result and this
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        return result
    if resume:
        check_same_settings(settings, out)
    # before any data is read: that of a text may need a smaller vocabulary, but no larger model
    check_memory(settings.to_decoder_config(1, settings.context))
    data = data or load_settings_data(settings)
    check_memory(settings.to_decoder_config(data.vocab_size, data.context))
    arguments = _arguments(settings, out)
    if first:
        _prepare_folder(settings, out, resume)
    with folder_locked(out) if first else contextlib.nullcontext():
        return _run(settings, out, resume, data, arguments, console, title, callbacks)


def _run(
    settings: TrainSettings,
    out: Path,
    resume: bool,
    data: Data,
    arguments: TrainingArguments,
    console: Console,
    title: str | None,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    """`train`, once all is there and nobody else works in `out`."""
    processes, first = _processes()
    checkpoint = last_checkpoint(out / CHECKPOINTS) if resume else None
    set_seed(settings.seed)
    config = settings.to_config(data.vocab_size, data.context, data.bos_token_id)
    decoder = config.to_decoder_config()
    model = HeedfulForCausalLM(config)
    rows_per_step = settings.batch_size * arguments.gradient_accumulation_steps * processes
    tokens_per_step = rows_per_step * data.context
    timer, stop = StepTimer(), StopOnCtrlC()
    brief, title = title is not None, title or f"{settings.attention} x {settings.score}"
    progress = ProgressCallback(title, tokens_per_step, console, brief)
    with quiet_transformers():
        trainer = LanguageModelTrainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=curve_rows(data.validation),
            data_collator=default_data_collator,
            callbacks=[timer, progress, stop, LogFile(out / LOG), *callbacks],
        )
        if settings.track == "tensorboard":
            trainer.add_callback(_tensorboard(out))
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(TqdmCallback)
        try:
            with stop:
                if checkpoint is not None:
                    check_checksums(Path(checkpoint))
                trainer.resumed = checkpoint is not None
                trainer.train(resume_from_checkpoint=checkpoint)
        except Exception as error:
            if shutil.disk_usage(out).free < 2**20:  # torch.save has other words for it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error
            if checkpoint is None or timer.begun is not None:
                raise  # not from reading the checkpoint, which ends before the first step
            raise ValueError(
                f"the checkpoint {checkpoint} cannot be read ({_first_line(error)}); delete that folder to "
                f"resume from the one before it"
            ) from error
        finally:
            progress.close()
    if stop.pressed and trainer.state.global_step < settings.steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step} of {settings.steps}")

    with spinner(console, f"{title}: validation loss"):
        final = evaluate(model, data.validation, batch_size=2 * settings.batch_size)
        longer = _accuracy_at(model, data, final, 2 * settings.batch_size)
    if not math.isfinite(final.loss):
        raise diverged("after the last step", f"the validation loss is {final.loss}", trainer.advice())
    model.config.use_cache = True  # Trainer turned it off
    if first:
        write_beside(model, out, card_facts(settings, final, data))
        model.save_pretrained(out)
    if first and data.tokenizer is not None:
        data.tokenizer.save_pretrained(out)  # type: ignore[union-attr]
    result = RunResult(
        attention=settings.attention,
        score=settings.score,
        seed=settings.seed,
        lr=settings.lr,
        params=decoder.parameter_count(),
        flops_per_token=decoder.flops_per_token(data.context),
        tokens=settings.steps * tokens_per_step,
        val_loss=final.loss,
        val_bpb=final.bits_per_byte(data.validation_bytes) if data.validation_bytes else None,
        val_accuracy=final.accuracy,
        seconds_per_step=timer.median,
        tokens_per_second=tokens_per_step / timer.median,
        cache_bytes_per_token=decoder.cache_bytes_per_token(),
        curve=[
            (int(entry["step"]) * tokens_per_step, entry["eval_loss"], entry["eval_accuracy"])
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ],
        config={"train": settings.to_dict(), "model": config.to_diff_dict()},
        accuracy_at=longer,
        data_digest=data.digest(),
    )
    if first:
        result.save(out / RESULT)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # a finished run needs none
    return result


def _processes() -> tuple[int, bool]:
    """How many train under a launcher such as torchrun, and whether this is the first, which talks and writes."""
    return int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"


def _accuracy_at(
    model: HeedfulForCausalLM, data: Data, final: Evaluation, batch_size: int
) -> dict[str, float] | None:
    """Right answers to a synthetic task at the length of training and beyond, as far as there are positions."""
    if data.task is None:
        return None
    found = {"1": final.accuracy}
    for times in LENGTHS:
        task = data.task.times(times)
        if model.config.positions == "learned" and task.length > model.config.max_position_embeddings:
            continue
        examples = max(LEAST_EXAMPLES, min(LONGER_EXAMPLES, LONGER_TOKENS // task.length))
        rows = TokenDataset(task.draw(examples, SYNTHETIC_VALIDATION_SEED + times))
        found[str(times)] = evaluate(model, rows, batch_size=max(1, batch_size // times)).accuracy
    return found


def card_facts(settings: TrainSettings, final: Evaluation, data: Data) -> dict[str, str]:
    """What the model card says of a run: its data, its training, its loss. Paths stay private but for the name."""
    loss = f"{final.loss:.3f} nats per token"
    if data.validation_bytes:
        loss += f", {final.bits_per_byte(data.validation_bytes):.3f} bits per byte"
    return {
        "data": f"{Path(settings.data).name}, tokenizer {settings.tokenizer}"
        if data.validation_bytes
        else settings.data,
        "training": f"{settings.steps} steps of {settings.batch_size} rows of {data.context} tokens, "
        f"peak learning rate {settings.lr:g}, seed {settings.seed}",
        "validation loss": f"{loss}; accuracy {final.accuracy:.1%}",
    }


def curve_rows(validation: TokenDataset) -> TokenDataset:
    """Some 64 rows, evenly spread: what the curve is measured on while training; the end takes all."""
    stride = max(1, len(validation) // 64)
    return TokenDataset({name: tensor[::stride] for name, tensor in validation.tensors.items()})


def load_settings_data(settings: TrainSettings) -> Data:
    """The data that the settings name."""
    return load_data(
        settings.data,
        validation=settings.val_data,
        text_column=settings.text_column,
        tokenizer=settings.tokenizer,
        vocab_size=settings.vocab_size,
        context=settings.context,
        seed=settings.seed,
        task_options=settings.task_options,
    )


def check_memory(config: DecoderConfig) -> None:
    """Raise for a model whose weights this machine cannot hold, before one is made.

    Raises:
        ValueError: if it is too large.
    """
    parameters, most = config.parameter_count(), memory_bytes()
    # on the CPU their gradients and two averages stand beside them
    needed = parameters * 4 * (1 if torch.accelerator.is_available() else 4)
    if needed > most:
        raise ValueError(
            f"a model of {parameters:,} parameters needs {needed:,} bytes, more than this machine's memory of "
            f"{most:,}; use a smaller --d-model, --n-layers or --d-ff"
        )


def check_same_settings(settings: TrainSettings, out: Path) -> None:
    """Raise unless `out` holds a run with these settings."""
    if not (out / SETTINGS).exists():
        raise FileNotFoundError(f"{out} holds no run to resume: there is no {out / SETTINGS}")
    before = TrainSettings.load(out / SETTINGS).to_dict()
    changed = [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in settings.to_dict().items()
        if before[name] != value
    ]
    if changed:
        raise ValueError(
            f"a resumed run keeps its settings, but {'; '.join(changed)}; leave those out or use another --out"
        )


def _prepare_folder(settings: TrainSettings, out: Path, resume: bool) -> None:
    """Make `out` and check that it can be written, before minutes of work depend on it."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, expected a folder for the run; use another --out")
    if out.exists() and holds_something(out) and not resume:
        what = "already holds a run" if (out / SETTINGS).exists() else "is not empty"
        raise FileExistsError(f"{out} {what}; use --resume to go on with it, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / SETTINGS).exists():
        settings.save(out / SETTINGS)


def _arguments(settings: TrainSettings, out: Path) -> TrainingArguments:
    arguments: dict[str, Any] = {
        "output_dir": str(out / CHECKPOINTS),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": 2 * settings.batch_size,
        "learning_rate": settings.lr,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": settings.precision == "bf16",
        "use_cpu": not torch.accelerator.is_available(),  # without it, bf16 asks for a GPU
        "seed": settings.seed,
        "data_seed": settings.seed,
        "eval_strategy": "steps",
        "eval_steps": max(1, settings.steps // settings.evaluations),
        "save_strategy": "steps",
        "save_steps": max(1, settings.steps // settings.checkpoints),
        "save_total_limit": 2,
        "logging_steps": max(1, settings.steps // 100),
        "logging_nan_inf_filter": False,  # such a loss ends the run
        "ddp_find_unused_parameters": False,
        "report_to": "none",  # tracking is added as a callback, which knows its folder
        "disable_tqdm": True,
    }
    if "lr_scheduler_type" not in settings.trainer:  # another schedule has options of its own
        arguments |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    return TrainingArguments(**arguments | settings.trainer)


def _tensorboard(out: Path) -> TrainerCallback:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            '--track tensorboard needs tensorboard: pip install "heedful[tensorboard]"'
        ) from None
    return TensorBoardCallback(SummaryWriter(str(out / "tensorboard")))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Progress is ours; only errors of the libraries below are worth a line."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerate_logger = logging.getLogger("accelerate")
    level = accelerate_logger.level
    accelerate_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(before)
        accelerate_logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().split("\n")[0]

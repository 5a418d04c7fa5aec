"""One adaptation: selectors of a converted model learn whom to forget; LoRA may learn to do without them."""

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, default_data_collator, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as TqdmCallback

from heedful.adaptation.amount import amount_for
from heedful.adaptation.learning import Forgetting, input_sizes, learning_layers, start_selectors
from heedful.adaptation.lora import projections, with_lora
from heedful.adaptation.progress import AdaptProgress
from heedful.adaptation.result import AdaptResult
from heedful.adaptation.settings import LEAST_CONTEXT, SETTINGS, AdaptSettings
from heedful.adaptation.trainer import WEIGHTS, AdaptTrainer, DistillTrainer, LocalTrainer
from heedful.attention.eviction import Eviction
from heedful.data import Data, TokenDataset, load_data
from heedful.errors import Interrupted
from heedful.evaluation.loss import divergence, measuring
from heedful.files import folder_locked, write_text
from heedful.hf.converted.rewrite import rewrite
from heedful.hf.converted.settings import FIELD, Conversion
from heedful.hf.load import load_model, load_tokenizer
from heedful.hf.names import CACHE
from heedful.ops.eviction import Rule
from heedful.screen import spinner
from heedful.training.checkpoint import check_checksums, last_checkpoint
from heedful.training.progress import LogFile, StepTimer, StopOnCtrlC
from heedful.training.run import quiet_transformers

FOLDER = "adapt"
"""Where a model's folder keeps what belongs to its adaptation."""
RESULT, LOG, DONE = "result.json", "log.jsonl", "done"
FINAL, PENDING, DATA = "final.safetensors", "final.json", "data.sha256"
STAGES = "local", "distill"
CHECKPOINT_PARTS = WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json"
MEASURED_ROWS = 2
MANY_PASSES = 10
"""Over the same text; beyond, it is said that there is little."""


def adapt(
    folder: str | Path,
    settings: AdaptSettings,
    *,
    resume: bool = False,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> AdaptResult:
    """Let the selectors of a converted model learn whom to forget, and save it where it is.

    First stage, forward passes only: each layer's selectors learn to rank tokens by the attention that they will
    get (`heedful.adaptation.objective`). Second stage, with `lora`: adapters on the attention projections learn to
    predict under eviction what the model predicts with every token; they are merged into its weights. A model in
    which nobody votes (score "softmax") has the second stage alone, and the oldest go.

    Args:
        folder: a converted model with added selectors that only rank. Weights and config are replaced at the
            very end; `folder/adapt` keeps settings, checkpoints while it runs, a log and the result.
        settings: what to do.
        resume: go on from the last checkpoint.
        console: where to show progress.
        callbacks: more of Trainer's callbacks, for both stages.

    Returns:
        The figures, also in `folder/adapt/result.json`.

    Raises:
        FileNotFoundError: if `folder` is no model.
        FileExistsError: if an adaptation is there already, and `resume` is False.
        ValueError: if it has no selectors to train, or settings or data are unsound.
        Interrupted: after Ctrl-C; `resume=True` goes on.
        Locked: if another process works in the folder.
        ImportError: for `lora` without PEFT.
    """
    folder, writes = Path(folder), os.environ.get("RANK", "0") == "0"
    console = console or Console(stderr=True, quiet=not writes, highlight=False)
    with folder_locked(folder) if writes and folder.is_dir() else nullcontext():
        return _adapt(folder, settings, resume, console, callbacks, writes)


def _adapt(
    folder: Path,
    settings: AdaptSettings,
    resume: bool,
    console: Console,
    callbacks: Sequence[TrainerCallback],
    writes: bool,
) -> AdaptResult:
    """`adapt`, while nobody else works in the folder."""
    place, started = folder / FOLDER, time.perf_counter()
    settings = _settled(place, settings, resume)
    if resume and (place / RESULT).exists():
        result = AdaptResult.load(place / RESULT)
        _clean(place)  # it may have been killed between its result and this
        return result
    if resume and (place / PENDING).exists():  # a stop in the middle of the very end
        return _finish(folder)
    with spinner(console, f"loading {folder}"):
        model = load_model(folder)
    selects = check_adaptable(model, folder, settings.lora)
    settings = _resolved(settings, model)
    with spinner(console, "reading the data"):
        data = load_data(
            settings.data,
            validation=settings.val_data,
            text_column=settings.text_column,
            tokenizer=load_tokenizer(folder),
            context=settings.context or LEAST_CONTEXT,
        )
    work = _Work(model, settings, data, place, console, selects, callbacks)
    if writes:
        place.mkdir(exist_ok=True)
        settings.save(place / SETTINGS)
        _keep_data(place, work.rows, resume)
    kl = [work.measured()]
    if selects and settings.local_tokens != 0:
        work.local(resume)
    kl.append(work.measured())
    if settings.lora:
        kl.append(work.distill(resume))
    result = AdaptResult(
        kl_before=kl[0],
        kl_after_local=kl[1],
        kl=kl[-1],
        held=work.budget,
        context=work.context,
        validation_rows=len(work.validation),
        local_tokens=work.read["local"],
        distill_tokens=work.read["distill"],
        trained_parameters=work.trained,
        policy=work.eviction.policy,
        seconds=time.perf_counter() - started,
        settings=settings.to_dict(),
    )
    if not writes:
        return result
    changed = {name: t.detach().cpu().contiguous() for name, t in work.changed().items()}
    save_file(changed, place / FINAL)
    result.save(place / PENDING)
    return _finish(folder)


def _finish(folder: Path) -> AdaptResult:
    """Give the model its new weights. They lie in a file: a stop in between is made good by doing it again."""
    place = folder / FOLDER
    result = AdaptResult.load(place / PENDING)
    settings = AdaptSettings(**result.settings)
    eviction = Eviction(result.held, result.policy, grace=settings.kv_grace, first=settings.kv_first)
    rewrite(folder, load_file(place / FINAL), eviction, _facts(result))
    os.replace(place / PENDING, place / RESULT)
    _clean(place)
    return result


def _clean(place: Path) -> None:
    """Remove what only an adaptation at work needs."""
    (place / FINAL).unlink(missing_ok=True)
    for stage in STAGES:
        shutil.rmtree(place / stage, ignore_errors=True)


def _keep_data(place: Path, rows: TokenDataset, resume: bool) -> None:
    """Remember what is learned from; raise where it is no longer what it was."""
    own = hashlib.sha256(rows.tensors["input_ids"].numpy().tobytes()).hexdigest()
    path = place / DATA
    if resume and path.exists() and path.read_text() != own:
        raise ValueError(
            f"the data is not what this adaptation began with; bring it back, or delete {place} and adapt again"
        )
    write_text(path, own)


def check_adaptable(model: Any, folder: Path, lora: int) -> bool:
    """Whether the model has selectors that can learn.

    Raises:
        ValueError: if nothing in it can.
    """
    if not hasattr(model.config, FIELD):
        raise ValueError(
            f"{folder} is no converted model; heedful convert makes one, and models of heedful train learn "
            f"selection from the start"
        )
    if any(layer.window is not None for layer in learning_layers(model)):
        raise ValueError(
            f"{folder} has a sliding window in every layer; what a selector would learn from looks beyond it, so "
            f"that it cannot be adapted: evict without, by --kv-policy streaming or h2o"
        )
    conversion = Conversion.of(model.config)
    if conversion.score == "softmax" and lora:
        return False
    options = conversion.score_options
    if options.get("selector", "head") == "head" or options.get("subtract", True):
        raise ValueError(
            f"{folder} was converted with score {conversion.score!r} and {options}; what learns are added "
            f"selectors that only rank: convert the source again, without --score, --selector and --subtract"
        )
    return True


def _settled(place: Path, settings: AdaptSettings, resume: bool) -> AdaptSettings:
    """The settings of the adaptation to resume, or these; raises where one is in the way, or missing."""
    saved = place / SETTINGS
    if not resume and saved.exists():
        done = (place / RESULT).exists()
        hint = f"delete {place} to adapt it further" if done else "--resume goes on with it"
        raise FileExistsError(f"{place} holds {'a finished' if done else 'an unfinished'} adaptation; {hint}")
    if not resume:
        return settings
    if not saved.exists():
        raise FileNotFoundError(f"there is no adaptation to resume: {saved} is missing")
    before, plain = AdaptSettings.load(saved), AdaptSettings()
    changed = [
        f"{name} was {getattr(before, name)!r} and is {value!r}"
        for name, value in settings.to_dict().items()
        if value not in (getattr(before, name), getattr(plain, name))
    ]
    if changed:
        raise ValueError(
            f"a resumed adaptation keeps its settings, but {'; '.join(changed)}; leave those out"
        )
    return before


def _resolved(settings: AdaptSettings, model: Any) -> AdaptSettings:
    """With what was left out, by the model and the machine."""
    most = model.config.max_position_embeddings
    context = settings.context or min(2048, most)
    if not LEAST_CONTEXT <= context <= most:
        raise ValueError(
            f"--context must be {LEAST_CONTEXT} to {most:,}, what the model can read, got {context:,}"
        )
    budget, safe = round(settings.target_held * context), settings.kv_grace + settings.kv_first
    if budget <= safe:
        raise ValueError(
            f"--target-held {settings.target_held:g} of {context:,} tokens are {budget}, but the first "
            f"{settings.kv_first} and the newest {settings.kv_grace} never go: nobody is left to choose; hold more"
        )
    amount = amount_for(model.num_parameters(), torch.accelerator.is_available())
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    chosen: dict[str, Any] = {"context": context, "precision": "bf16" if bf16 else "fp32", **amount}
    given = {name: getattr(settings, name) for name in chosen}
    return dataclasses.replace(
        settings, **{name: chosen[name] if given[name] is None else given[name] for name in chosen}
    )


def _facts(result: AdaptResult) -> dict[str, str]:
    """Lines for the model card."""
    second = f", then LoRA on {result.distill_tokens:,} against the source" if result.distill_tokens else ""
    first = (
        f"selectors on {result.local_tokens:,} tokens, forward passes only"
        if result.local_tokens
        else "nobody votes"
    )
    return {
        "adapted": f"{first}{second}; data: {Path(result.settings['data']).name}",
        "KL to the source": f"{result.kl:.4f} nats per token where {result.held:,} of {result.context:,} tokens "
        f"are held, on {result.validation_rows} rows of validation text ({result.kl_before:.4f}: oldest first)",
    }


class _Work:
    """The stages, and what they share."""

    def __init__(
        self,
        model: Any,
        settings: AdaptSettings,
        data: Data,
        place: Path,
        console: Console,
        selects: bool,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        assert settings.context is not None
        self.model, self.settings, self.place, self.console = model, settings, place, console
        self.context, self.callbacks = settings.context, callbacks
        self.budget = round(settings.target_held * self.context)
        policy = "selective" if selects else "streaming"
        self.eviction = Eviction(self.budget, policy, grace=settings.kv_grace, first=settings.kv_first)
        self.rows = TokenDataset({"input_ids": data.train.tensors["input_ids"]})
        self.validation = whole_rows(data.validation, MEASURED_ROWS)
        self.trained, self.read = 0, dict.fromkeys(STAGES, 0)
        self.names: set[str] = set()
        model.to(torch.bfloat16 if settings.precision == "bf16" else torch.float32)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        model.requires_grad_(False)
        for layer in learning_layers(model):
            layer.score.float()

    def local(self, resume: bool) -> None:
        """The first stage: selectors alone."""
        settings, model = self.settings, self.model
        with self._autocast():
            sizes = input_sizes(model, self.rows.tensors["input_ids"][:1].to(model.device))
        set_seed(settings.seed)
        start_selectors(model, sizes)
        for layer in learning_layers(model):
            layer.score.requires_grad_(True)
        # nothing goes back through the layers
        options = {k: v for k, v in settings.trainer.items() if not k.startswith("gradient_checkpointing")}
        trainer = self._trainer(LocalTrainer, model, "local", settings.local_tokens, settings.lr, options)
        trainer.sizes, trainer.measure = sizes, self.measured
        trainer.grace, trainer.first = settings.kv_grace, settings.kv_first
        self._run(trainer, "local", resume)
        model.requires_grad_(False)

    def distill(self, resume: bool) -> float:
        """The second stage: LoRA, merged at the end. Returns the KL before that."""
        settings, rule = (
            self.settings,
            Rule(self.budget, grace=self.settings.kv_grace, first=self.settings.kv_first),
        )
        set_seed(settings.seed + 1)
        names = projections(self.model)
        with quiet_transformers():
            peft = with_lora(self.model, settings.lora)
        if settings.precision == "bf16":
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        with Forgetting(self.model, rule) as forgetting:
            trainer = self._trainer(
                DistillTrainer, peft, "distill", settings.distill_tokens, settings.lora_lr, settings.trainer
            )
            trainer.forgetting, trainer.rules = forgetting, self._rules(rule)
            trainer.measure = lambda: self.measured(peft, forgetting)
            self._run(trainer, "distill", resume)
            kl = self.measured(peft, forgetting)
        self.model = peft.merge_and_unload()
        self.names |= {f"{name}.weight" for name in names}
        return kl

    def _rules(self, target: Rule) -> list[Rule]:
        """Steps take turns: the target, half and twice as much, so that the model does not depend on one budget."""
        safe = target.grace + target.first + 1
        budgets = [self.budget, max(safe, self.budget // 2), min(self.context, 2 * self.budget)]
        return [dataclasses.replace(target, budget=budget) for budget in budgets]

    def changed(self) -> dict[str, Tensor]:
        """The weights that are others now, by name."""
        return {
            name: p for name, p in self.model.named_parameters() if name in self.names or ".score." in name
        }

    def measured(self, peft: Any = None, forgetting: Forgetting | None = None) -> float:
        """KL to the source with every token, nats per token, of a cache that holds the budget."""
        model, total = self.model, 0.0
        with (
            spinner(self.console, "measuring"),
            measuring(model),
            self._autocast(),
            nullcontext() if forgetting is None else forgetting.remembering(),
        ):
            for row in self.validation:
                ids = row[None].to(model.device)
                with nullcontext() if peft is None else peft.disable_adapter():
                    full = model(ids, use_cache=False).logits
                cache: Any = {CACHE: model.new_cache(self.eviction)}
                total += float(divergence(full, model(ids, **cache).logits)) / ids.numel()
        return total / len(self.validation)

    def _autocast(self) -> Any:
        return torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"
        )

    def _trainer(
        self,
        kind: type[AdaptTrainer],
        model: Any,
        stage: str,
        tokens: int | None,
        rate: float,
        options: dict[str, Any],
    ) -> Any:
        settings = self.settings
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        per_step = (
            settings.batch_size
            * self.context
            * processes
            * int(options.get("gradient_accumulation_steps", 1))
        )
        steps = max(1, round((tokens or 0) / per_step))
        self.read[stage] = steps * per_step
        if (passes := self.read[stage] / (len(self.rows) * self.context)) > MANY_PASSES:
            self.console.print(
                f"[yellow]the data has {len(self.rows) * self.context:,} tokens, which are read "
                f"{passes:,.0f} times; more text teaches better[/]"
            )
        often = max(1, steps // settings.checkpoints)
        arguments: dict[str, Any] = {
            "output_dir": str(self.place / stage),
            "max_steps": steps,
            "per_device_train_batch_size": settings.batch_size,
            "learning_rate": rate,
            "warmup_steps": min(20, steps // 10),
            "lr_scheduler_type": "cosine",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "bf16": settings.precision == "bf16",
            "use_cpu": not torch.accelerator.is_available(),
            "seed": settings.seed,
            "data_seed": settings.seed,
            "eval_strategy": "steps",
            "eval_steps": often,
            "save_strategy": "steps",
            "save_steps": often,
            "save_total_limit": 2,
            "logging_steps": max(1, steps // 100),
            "logging_nan_inf_filter": False,  # such a loss ends the run
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
        }
        stop, timer = StopOnCtrlC(), StepTimer()
        held = f"{self.budget:,} of {self.context:,} tokens held"
        progress = AdaptProgress(stage, held, per_step, self.console)
        with quiet_transformers():
            trainer: Any = kind(
                model=model,
                args=TrainingArguments(**arguments | options),
                train_dataset=self.rows,
                eval_dataset=self.rows,  # not read: `measure` knows its own
                data_collator=default_data_collator,
                callbacks=[timer, progress, stop, LogFile(self.place / f"{stage}-{LOG}"), *self.callbacks],
            )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(TqdmCallback)
        trainer.stop, trainer.progress, trainer.timer = stop, progress, timer
        self.trained += sum(p.numel() for p in model.parameters() if p.requires_grad)
        return trainer

    def _run(self, trainer: Any, stage: str, resume: bool) -> None:
        """Train; a stage that has been done before is read."""
        done = self.place / stage / DONE
        if resume and (done / WEIGHTS).exists():
            try:
                trainer.load_trained(done)
            except Exception as error:
                raise _unreadable(done, error, "to go on from the last checkpoint") from error
            return
        checkpoint = last_checkpoint(self.place / stage, CHECKPOINT_PARTS) if resume else None
        with quiet_transformers(), trainer.stop:
            try:
                if checkpoint is not None:
                    check_checksums(Path(checkpoint))
                trainer.train(resume_from_checkpoint=checkpoint)
            except Exception as error:
                if checkpoint is None or trainer.timer.begun is not None:
                    raise  # not from reading the checkpoint, which ends before the first step
                raise _unreadable(Path(checkpoint), error, "to go on from the one before it") from error
            finally:
                trainer.progress.close()
        step, steps = trainer.state.global_step, trainer.args.max_steps
        if trainer.stop.pressed and step < steps:
            raise Interrupted(f"stopped at step {step} of {steps} of the stage {stage!r}")
        if trainer.is_world_process_zero():
            trainer.save_trained(done)


def _unreadable(folder: Path, error: Exception, why: str) -> ValueError:
    reason = (str(error) or type(error).__name__).strip().split("\n")[0]
    return ValueError(f"{folder} cannot be read ({reason}); delete it {why}, with --resume")


def whole_rows(rows: TokenDataset, most: int) -> Tensor:
    """Some rows (n, T), evenly spread, without those that are padded unless all are."""
    ids, labels = rows.tensors["input_ids"], rows.tensors["labels"]
    whole = (labels[:, -1:] != -100).all(-1)
    ids = ids[whole] if bool(whole.any()) else ids
    n = min(most, len(ids))
    return ids[[i * len(ids) // n for i in range(n)]]

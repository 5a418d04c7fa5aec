"""What the demo does with each model: train it, then measure it. Every number is measured in one place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from heedful.data import (
    Data,
    TokenDataset,
    by_document,
    count_bytes,
    encode_documents,
    load_text,
    token_bytes,
)
from heedful.data.tasks.variable_assignment import VariableAssignment
from heedful.evaluation import evaluate
from heedful.evaluation.kv_budget import Budget, BudgetResult, evaluate_budgets
from heedful.hf.load import load_model
from heedful.screen import spinner
from heedful.training import RunResult, TrainSettings, train
from heedful.training.run import load_settings_data

VALIDATION_ROWS = 64
"""Rows of the validation text that every loss of the demo is measured on."""


def text_data(settings: TrainSettings) -> Data:
    """The text, with few validation rows that hold one document each.

    Curve, table and small caches are measured on the same rows, so that a model has one loss.
    """
    data = load_settings_data(settings)
    tokenizer: Any = data.tokenizer
    text = load_text(settings.data, settings.val_data, column=settings.text_column)
    rows = by_document(encode_documents(tokenizer, text.validation), data.context, tokenizer.bos_token_id)
    n = len(rows["labels"])
    chosen = [i * n // VALIDATION_ROWS for i in range(VALIDATION_ROWS)] if n > VALIDATION_ROWS else range(n)
    some = {name: tensor[list(chosen)] for name, tensor in rows.items()}
    return replace(
        data,
        validation=TokenDataset(some),
        validation_bytes=count_bytes(some["labels"], token_bytes(tokenizer)),
        description=f"{data.description}. Every loss here is that on the same {len(chosen)} validation rows",
    )


@dataclass(frozen=True)
class TextModel:
    """A language model: its figures, and its loss and bytes with a full cache and with small ones."""

    settings: TrainSettings
    folder: Path
    data: Data
    kept: tuple[int, ...]
    """Tokens that a layer keeps."""
    policy: str | None
    """Which token is evicted; None measures no small cache."""

    @property
    def title(self) -> str:
        """What the model is called."""
        return f"{self.settings.attention} x {self.settings.score}"

    @property
    def steps(self) -> int:
        """Steps of training."""
        return self.settings.steps

    def run(
        self, console: Console, callbacks: Sequence[TrainerCallback]
    ) -> tuple[RunResult, list[BudgetResult]]:
        """Train and measure."""
        result = train(
            self.settings,
            self.folder,
            resume=(self.folder / "train.json").exists(),
            data=self.data,
            console=console,
            callbacks=callbacks,
        )
        if self.policy is None:
            return result, []
        with spinner(console, f"{self.title} with a cache of few tokens"):
            budgets: list[Budget] = [*self.kept, "full"]
            held = evaluate_budgets(
                load_model(self.folder), self.data.validation, budgets, [self.policy], decoded=2
            )
            return result, list(held)


@dataclass(frozen=True)
class Answers:
    """What a model that learned variable assignment can do."""

    result: RunResult
    by_length: dict[int, float]
    """Share of right answers by number of statements."""
    by_budget: dict[str, dict[int, float]]
    """Share of right answers by policy and by the tokens that each layer keeps."""


@dataclass(frozen=True)
class TaskModel:
    """A model of variable assignment: its right answers at every length, and with small caches."""

    settings: TrainSettings
    folder: Path
    statements: tuple[int, ...]
    budgeted: int
    """Statements of the programs that are read with a small cache."""
    kept: tuple[int, ...]
    policies: tuple[str, ...]

    @property
    def title(self) -> str:
        """What the model is called."""
        return f"variable assignment, {self.settings.score}"

    @property
    def steps(self) -> int:
        """Steps of training."""
        return self.settings.steps

    def run(self, console: Console, callbacks: Sequence[TrainerCallback]) -> Answers:
        """Train and measure."""
        result = train(
            self.settings,
            self.folder,
            resume=(self.folder / "train.json").exists(),
            console=console,
            callbacks=callbacks,
        )
        model = load_model(self.folder)
        with spinner(console, f"{self.title}: longer programs, smaller caches"):
            rows = {
                n: TokenDataset(VariableAssignment(statements=n).draw(256, seed=10_007 + n))
                for n in self.statements
            }
            by_length = {n: evaluate(model, rows[n]).accuracy for n in self.statements}
            half = TokenDataset({name: t[:128] for name, t in rows[self.budgeted].tensors.items()})
            by_budget = {
                policy: {
                    n: evaluate(model, half, batch_size=128, kv_budget=n, kv_policy=policy).accuracy
                    for n in self.kept
                }
                for policy in self.policies
            }
        return Answers(result, by_length, by_budget)

"""The synthetic task "variable assignment": remember the last value given to each variable.

    BOS  = a 3  = b 7  ? a 3  = a 5  ? a 5  ...

A sequence is BOS and then statements of three tokens, an operation, a variable and a value. `=`
assigns; `?` asks, and its value token is the variable's current value: the only tokens that can
be known in advance, and the only ones that are labelled. Ids:

| id                                    | token      |
|---------------------------------------|------------|
| 0                                     | BOS        |
| 1                                     | `=`        |
| 2                                     | `?`        |
| 3 ... 3 + variables - 1               | variables  |
| 3 + variables ... vocab size - 1      | values     |
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.data.packing import IGNORE

BOS, ASSIGN, ASK, FIRST_VARIABLE = 0, 1, 2, 3
TOKENS_PER_STATEMENT = 3


def variable_assignment_vocab_size(variables: int = 6, values: int = 8) -> int:
    """Number of token ids that the task uses."""
    return FIRST_VARIABLE + variables + values


def variable_assignment(
    n: int, statements: int = 32, variables: int = 6, values: int = 8, seed: int = 0
) -> dict[str, Tensor]:
    """Draw `n` sequences; the same arguments give the same sequences.

    The first statement assigns. Each later one asks with probability 1/2, uniformly among the
    variables assigned so far, or else assigns a uniform value to a uniform variable.

    Args:
        n: number of sequences.
        statements: statements in each sequence, at least 2 (a single one never asks).
        variables: number of variables, at least 1.
        values: number of values, at least 2 (one is no question).
        seed: seed of the sequences; the global generator is not touched.

    Returns:
        `input_ids` and `labels`, int64 of shape (n, 3 * statements + 1). Labels are the value
        tokens of `?` statements and -100 elsewhere.

    Raises:
        ValueError: a size is below its minimum.
    """
    _check_at_least(n=(n, 1), statements=(statements, 2), variables=(variables, 1))
    _check_at_least(values=(values, 2))
    generator = torch.Generator().manual_seed(seed)
    everyone = torch.arange(n)
    current = torch.full((n, variables), -1)  # value of each variable, -1 before the first
    input_ids = torch.full((n, TOKENS_PER_STATEMENT * statements + 1), BOS)
    labels = torch.full_like(input_ids, IGNORE)
    for statement in range(statements):
        asks = torch.rand(n, generator=generator) < (0.5 if statement else 0.0)
        # The largest of independent uniform numbers picks uniformly among the assigned.
        lots = torch.rand(n, variables, generator=generator).masked_fill(current < 0, -1.0)
        target = torch.randint(variables, (n,), generator=generator)
        fresh = torch.randint(values, (n,), generator=generator)
        variable = torch.where(asks, lots.argmax(dim=1), target)
        value = torch.where(asks, current[everyone, variable], fresh)
        current[everyone, variable] = value  # asking writes back what was there

        at = TOKENS_PER_STATEMENT * statement + 1
        value_id = FIRST_VARIABLE + variables + value
        input_ids[:, at] = torch.where(asks, ASK, ASSIGN)
        input_ids[:, at + 1] = FIRST_VARIABLE + variable
        input_ids[:, at + 2] = value_id
        labels[:, at + 2] = torch.where(asks, value_id, IGNORE)
    return {"input_ids": input_ids, "labels": labels}


def answer_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of labelled tokens that are the argmax of the logits one position before.

    Args:
        logits: (batch, tokens, vocab).
        labels: (batch, tokens), -100 where nothing is asked.

    Raises:
        ValueError: the shapes disagree or nothing is labelled.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            "logits must be (batch, tokens, vocab) with the batch and tokens of labels "
            f"{tuple(labels.shape)}, got {tuple(logits.shape)}"
        )
    asked = labels[:, 1:] != IGNORE
    if not asked.any():
        raise ValueError("nothing to score: every label after the first column is -100")
    right = logits[:, :-1].argmax(dim=-1) == labels[:, 1:]
    return right[asked].double().mean().item()


def _check_at_least(**sizes: tuple[int, int]) -> None:
    for name, (got, least) in sizes.items():
        if got < least:
            raise ValueError(f"{name} must be at least {least}, got {got}")

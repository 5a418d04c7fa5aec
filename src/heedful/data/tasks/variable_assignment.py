"""The task "variable assignment": remember the last value given to each variable.

    BOS  = a 3  = b 7  ? a 3  = a 5  ? a 5  ...

Statements of three tokens, an operation, a variable and a value. `=` assigns; `?` asks, and its value token is the
variable's current value: the only tokens that can be known in advance, and the only ones that are labelled. Ids:

| id                                    | token      |
|---------------------------------------|------------|
| 0                                     | BOS        |
| 1                                     | `=`        |
| 2                                     | `?`        |
| 3 ... 3 + variables - 1               | variables  |
| 3 + variables ... vocab size - 1      | values     |
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heedful.attention.config import option
from heedful.data.packing import IGNORE
from heedful.data.tasks.task import BOS, Task, nothing_asked

ASSIGN, ASK, FIRST_VARIABLE = 1, 2, 3
TOKENS_PER_STATEMENT = 3


@dataclass(frozen=True, kw_only=True)
class VariableAssignment(Task):
    """Statements that set variables and ask for their current values.

    The first statement assigns. Each later one asks with probability 1/2, uniformly among the variables assigned
    so far, or else assigns a uniform value to a uniform variable. Where none has asked, the last one does.
    """

    name: ClassVar[str] = "variable-assignment"
    grows: ClassVar[str] = "statements"
    least: ClassVar[dict[str, int]] = {"statements": 2, "values": 2}  # a single statement never asks

    statements: int = option(32, "statements of three tokens")
    variables: int = option(6, "variables")
    values: int = option(8, "values a variable may have")

    @property
    def length(self) -> int:
        """3 tokens for each statement, after BOS."""
        return TOKENS_PER_STATEMENT * self.statements + 1

    @property
    def vocab_size(self) -> int:
        """BOS, two operations, variables, values."""
        return FIRST_VARIABLE + self.variables + self.values

    def _draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        everyone = torch.arange(n)
        current = torch.full((n, self.variables), -1)  # value of each variable, -1 before the first
        input_ids = torch.full((n, self.length), BOS)
        labels = nothing_asked(input_ids)
        silent = torch.ones(n, dtype=torch.bool)  # nothing asked so far
        for statement in range(self.statements):
            asks = torch.rand(n, generator=generator) < (0.5 if statement else 0.0)
            if statement == self.statements - 1:
                asks |= silent
            silent &= ~asks
            # The largest of independent uniform numbers picks uniformly among the assigned.
            lots = torch.rand(n, self.variables, generator=generator).masked_fill(current < 0, -1.0)
            target = torch.randint(self.variables, (n,), generator=generator)
            fresh = torch.randint(self.values, (n,), generator=generator)
            variable = torch.where(asks, lots.argmax(dim=1), target)
            value = torch.where(asks, current[everyone, variable], fresh)
            current[everyone, variable] = value  # asking writes back what was there

            at = TOKENS_PER_STATEMENT * statement + 1
            value_id = FIRST_VARIABLE + self.variables + value
            input_ids[:, at] = torch.where(asks, ASK, ASSIGN)
            input_ids[:, at + 1] = FIRST_VARIABLE + variable
            input_ids[:, at + 2] = value_id
            labels[:, at + 2] = torch.where(asks, value_id, IGNORE)
        return {"input_ids": input_ids, "labels": labels}

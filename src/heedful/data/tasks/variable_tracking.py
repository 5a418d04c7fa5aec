"""The task "variable tracking": follow values through chains of assignments, as RULER asks.

    BOS  = a 3  & b a  & c b  ? c 3  = a 5  ? c 3  ...

`= a 3` gives a variable a value, `& b a` copies the current value of another, `? c 3` asks. Only the answers are
labelled. Ids: BOS, `=`, `&`, `?`, variables, values.
Hsieh et al., RULER, arXiv 2404.06654, section 3.2 (their chains stand in a text, and are asked for at the end).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heedful.attention.config import option
from heedful.data.packing import IGNORE
from heedful.data.tasks.task import BOS, Task, nothing_asked

ASSIGN, COPY, ASK, FIRST_VARIABLE = 1, 2, 3, 4
TOKENS_PER_STATEMENT = 3


@dataclass(frozen=True, kw_only=True)
class VariableTracking(Task):
    """Statements that set variables, copy them, and ask for their current values.

    The first statement gives a value. Each later one gives one, copies, or asks, with equal probability; what is
    copied or asked for is uniform among the variables that have a value. Where none has asked, the last one does.
    """

    name: ClassVar[str] = "variable-tracking"
    grows: ClassVar[str] = "statements"
    least: ClassVar[dict[str, int]] = {"statements": 2, "values": 2, "variables": 2}

    statements: int = option(32, "statements of three tokens")
    variables: int = option(6, "variables")
    values: int = option(8, "values a variable may have")

    @property
    def length(self) -> int:
        """3 tokens for each statement, after BOS."""
        return TOKENS_PER_STATEMENT * self.statements + 1

    @property
    def vocab_size(self) -> int:
        """BOS, three operations, variables, values."""
        return FIRST_VARIABLE + self.variables + self.values

    def _draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        everyone = torch.arange(n)
        current = torch.full((n, self.variables), -1)  # value of each variable, -1 before the first
        input_ids = torch.full((n, self.length), BOS)
        labels = nothing_asked(input_ids)
        silent = torch.ones(n, dtype=torch.bool)  # nothing asked so far
        for statement in range(self.statements):
            operation = torch.randint(3, (n,), generator=generator) + ASSIGN
            if statement == 0:
                operation.fill_(ASSIGN)
            if statement == self.statements - 1:
                operation.masked_fill_(silent, ASK)
            asks = operation == ASK
            silent &= ~asks
            lots = torch.rand(n, self.variables, generator=generator).masked_fill(current < 0, -1.0)
            known = lots.argmax(dim=1)
            target = torch.randint(self.variables, (n,), generator=generator)
            fresh = torch.randint(self.values, (n,), generator=generator)
            variable = torch.where(asks, known, target)
            value = torch.where(operation == ASSIGN, fresh, current[everyone, known])
            current[everyone, variable] = value  # asking writes back what was there

            at = TOKENS_PER_STATEMENT * statement + 1
            value_id = FIRST_VARIABLE + self.variables + value
            input_ids[:, at] = operation
            input_ids[:, at + 1] = FIRST_VARIABLE + variable
            input_ids[:, at + 2] = torch.where(operation == COPY, FIRST_VARIABLE + known, value_id)
            labels[:, at + 2] = torch.where(asks, value_id, IGNORE)
        return {"input_ids": input_ids, "labels": labels}

"""What a trained model is worth: loss, bits per byte, answers, and what is left of them with a small cache."""

from heedful.evaluation.kv_budget import BudgetResult, evaluate_budgets
from heedful.evaluation.loss import Evaluation, evaluate

__all__ = ["BudgetResult", "Evaluation", "evaluate", "evaluate_budgets"]

"""EleutherAI's lm-evaluation-harness: heedful's models in it, tasks that need no network, tables of budgets.

`model` is what the harness calls `heedful`; `offline` holds tasks as it reads them, each a YAML file; `run`
measures tasks with several budgets. `python -m heedful.lm_eval` is the harness's own command with both.
"""

from importlib.util import find_spec
from pathlib import Path

TASKS = Path(__file__).with_name("offline")
"""The folder of our tasks, for `--include_path`."""
NEEDED = (
    'tasks need lm-evaluation-harness: pip install "heedful[tasks]" (or lm-eval>=0.4.13 beside heedful[lm])'
)


def check_installed() -> None:
    """Raise an ImportError that says what to install, unless the harness is there."""
    if find_spec("lm_eval") is None:
        raise ImportError(NEEDED)

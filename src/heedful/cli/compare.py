"""`heedful compare`."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, flag_fields, form_options, parse, peek, split, task_options, whole
from heedful.cli.train import compile_flag, compiled, given_trainer_options
from heedful.comparison.matching import Match
from heedful.comparison.settings import CompareSettings
from heedful.errors import Interrupted
from heedful.screen import spinner
from heedful.training.settings import TrainSettings

DESCRIPTION = """Train every attention x score with the same data order and seeds, and compare.

    heedful compare --attention mha,sas --score softmax,selective --seeds 3 --out runs/cmp

Writes results.jsonl (a row per run), summary.md and compare.png; the first form is the baseline. Running
the same command again goes on where it stopped. All forms start from the same logit scale
(--init-logit-std), a confounder of such comparisons; the learning rate is the larger one, and --lr-sweep
finds that of each form. --match evens out parameters, training FLOPs or seconds (for FLOPs name the costliest
form first); --baseline-steps says what a form's compute is worth. Options
--attention.* and --score.* go to every form that has them, --task.* and --trainer.* to every run (heedful train
--help). Shown below are those of the forms and the task that are named before --help: heedful compare --score
forgetting --data synthetic:mqar --help.

    heedful compare --data synthetic:mqar --task.pairs 16 --task.tokens 128 --seeds 5 --workers 2
    heedful compare --ray auto      # on a cluster"""


def run(arguments: Sequence[str]) -> int:
    """Compare."""
    attention = peek(arguments, "attention", "mha,sas")
    score = peek(arguments, "score", "softmax,selective")
    arguments, trainer = given_trainer_options(arguments)
    own = ("attention", "score", "seed", "trainer")
    kept = [f for f in flag_fields(TrainSettings) if f[0] not in own]
    values = parse(
        "compare",
        DESCRIPTION,
        [
            flag("attention", str, "mha,sas", "attention forms, separated by commas (heedful ls)"),
            flag("score", str, "softmax,selective", "score forms, separated by commas"),
            flag("seeds", int, 2, "runs of each form"),
            flag(
                "match",
                Match,
                "none",
                "held equal to the first form: params or flops within 1 % by the width of the SwiGLU, seconds by "
                "the number of steps",
            ),
            flag(
                "baseline_steps",
                str,
                "",
                "also train the first form for these numbers of steps, e.g. 250,1000: what the others' compute is "
                "worth",
            ),
            flag(
                "lr_sweep",
                str,
                "",
                "learning rates to try on each form, e.g. 2e-3,5e-3,1e-2,2e-2, on a seed that counts nowhere else; "
                "default: --lr for all",
            ),
            *kept,
            form_options("attention", ATTENTIONS, split("--attention", attention, str)),
            form_options("score", SCORES, split("--score", score, str)),
            task_options(peek(arguments, "data", TrainSettings.data)),
            compile_flag(),
            flag("out", str, "runs/compare", "folder for the results"),
            flag("workers", int, 1, "runs at a time, each with its share of the cores"),
            flag(
                "ray",
                str | None,
                None,
                'run on a Ray cluster: its address, "auto", or "local" for one on this machine',
            ),
        ],
        arguments,
    )
    trainer |= compiled(values.pop("compile"))
    out, how = Path(values.pop("out")), {name: values.pop(name) for name in ("workers", "ray")}
    if how["workers"] < 1:
        raise UsageError(f"--workers must be 1 or more, got {how['workers']}")
    chosen = {
        "attention": split("--attention", values["attention"], str),
        "score": split("--score", values["score"], str),
        "lr_sweep": split("--lr-sweep", values["lr_sweep"], float),
        "baseline_steps": split("--baseline-steps", values["baseline_steps"], whole),
    }
    try:
        settings = CompareSettings.of(**{**values, **chosen, "trainer": trainer})
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    console = Console()
    with spinner(console, "loading transformers"):
        from heedful.comparison.run import compare

    try:
        compare(settings, out, console=console, **how)
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; the same command goes on") from None
    names = ["summary.md", "compare.png", "results.jsonl", *(["sweep.jsonl"] if settings.lr_sweep else [])]
    print(f"written: {', '.join(str(out / name) for name in names)}")
    return 0

"""`heedful eval`."""

import time
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful.attention.eviction import POLICIES, get_policy
from heedful.cli.errors import UsageError
from heedful.cli.eval_tasks import run_tasks
from heedful.cli.parsing import flag, parse, positional, split, whole
from heedful.errors import Interrupted
from heedful.files import write_text
from heedful.screen import Column, counted, progress_bar, spinner, table, text

DESCRIPTION = """Measure a trained model with a KV cache that holds few tokens.

    heedful eval runs/a                                            # each policy with 8, 16, 32, 64 tokens
    heedful eval runs/a --kv-budget 4,16,full --policy streaming,tova --rows 64
    heedful eval runs/a --data other.txt --out runs/a/eval-other
    heedful eval converted --data book.txt --rows 8                # an eighth, a quarter, a half of the context
    heedful eval converted --source stock --data book.txt --rows 8 --policy selective,h2o,snapkv
    heedful eval converted --tasks blimp,needle --task-data blimp --limit 200 --kv-budget 64,full

A budget is how many tokens the cache of each layer holds while a query attends, the first and the newest
included; the policy says which token goes when one more arrives. The text is read as decoding would read it,
one document or a piece of one per row, from the validation data of the run unless --data names another.

    loss      nats per token, lower is better; bits/byte compares across tokenizers
    right     share of right answers, for synthetic tasks
    KL        how far the predictions are from those of the full cache, nats per token; 0 = the same
    same      share of tokens whose most likely prediction is that of the full cache
    bytes     what the cache of one row occupies; full: the tokens it holds at the end of a row
    tokens/s  decoding one row token by token, on this machine, in plain PyTorch

The policies tova and keydiff protect no recent token: give them --kv-grace. h2o protects half the budget, snapkv
the tokens of its window, 32 or half the budget.

With --source, the stock model that this one was made from: its full cache is what predictions are compared with,
and the policies that need no training run on it, unless this one selects nothing (--score softmax).

Writes eval.csv (anew after every measurement, so that Ctrl-C loses only the one at work) and eval.png.

With --tasks, lm-evaluation-harness asks: log-likelihoods and generated texts obey the budget. These tasks need no
network; any other that the harness knows can be named beside them:

    blimp     pairs of sentences, which is good English; from the folder --task-data
    text      bits per byte of --data, read --context tokens at a time
    made up   --length tokens long: needle, needle_multikey, variable_tracking, copy, mqar (facts to recall)

Writes tasks.json, anew after every measurement."""

TABLE, FIGURE = "eval.csv", "eval.png"
USUAL = "8,16,32,64,full"
MOST_ROWS = 256
MOST_LOGITS = 2**27  # of a batch, half a gigabyte
LENGTH, MADE = "512", 100
LINE_EVERY = 10.0  # seconds, where there is no bar


def run(arguments: Sequence[str]) -> int:
    """Measure, and leave table and figure."""
    values = parse(
        "eval",
        DESCRIPTION,
        [
            positional("run", str, MISSING, "folder of a trained model"),
            flag("data", str | None, None, "text to measure on; the validation data of the run if left out"),
            flag(
                "text_column",
                str | None,
                None,
                "column of --data that holds the texts; the run's if left out",
            ),
            flag(
                "kv_budget",
                str | None,
                None,
                f"tokens the cache of each layer holds, or full; {USUAL}, for a converted model parts of --context",
            ),
            flag("source", str | None, None, "folder of the stock model that this one was made from"),
            flag(
                "policy",
                str | None,
                None,
                f"of {', '.join(POLICIES)}; if left out: selective (where the model is), streaming and h2o",
            ),
            flag(
                "context",
                int | None,
                None,
                "tokens in a row; the run's if left out, for a converted model 2048",
            ),
            flag("kv_grace", int | None, None, "newest tokens that are never evicted; as saved, or 1"),
            flag("kv_first", int | None, None, "first tokens that are never evicted; as saved, or 1"),
            flag("rows", int | None, None, f"rows to measure on, evenly spread; {MOST_ROWS} if left out"),
            flag("tasks", str | None, None, "tasks of lm-evaluation-harness, instead of a text"),
            flag("task_data", str | None, None, "with --tasks blimp: folder of its .jsonl files"),
            flag("length", str, LENGTH, "with --tasks: tokens of the texts that are made"),
            flag(
                "limit",
                int | None,
                None,
                f"with --tasks: documents of each; all, or {MADE} of those that are made",
            ),
            flag("out", str | None, None, "folder for table and figure; eval in the folder of the model"),
        ],
        arguments,
    )
    safe = values["kv_grace"], values["kv_first"]
    budgets = None if values["kv_budget"] is None else _budgets(values["kv_budget"], *safe_or_one(safe))
    if values["context"] is not None and values["context"] < 2:
        raise UsageError(f"--context must be 2 or more, got {values['context']}")
    policies = None if values["policy"] is None else _policies(values["policy"])
    if values["text_column"] is not None and values["data"] is None:
        raise UsageError(f"--text-column {values['text_column']} belongs to --data, and none is given")
    if values["rows"] is not None and values["rows"] < 1:
        raise UsageError(f"--rows must be 1 or more, got {values['rows']}")
    folder = Path(values["run"])
    out = folder / "eval" if values["out"] is None else Path(values["out"])
    if values["tasks"] is not None:
        if values["rows"] is not None:
            raise UsageError("--rows belongs to a text, with --tasks it is --limit")
        if values["source"] is not None:
            raise UsageError("--source belongs to a text, not to --tasks")
        values["kv_grace"], values["kv_first"] = safe_or_one(safe)
        return run_tasks(folder, values, budgets or _budgets(USUAL, *safe_or_one(safe)), policies, out)
    for name, usual in (("task_data", None), ("length", LENGTH), ("limit", None)):
        if values[name] != usual:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --tasks, and none is given")
    data = values["data"], values["text_column"], values["context"]
    source = None if values["source"] is None else Path(values["source"])
    _evaluate(folder, source, *data, budgets, policies, safe, values["rows"], out)
    return 0


def safe_or_one(safe: tuple[int | None, int | None]) -> tuple[int, int]:
    """The newest and the first tokens that never go."""
    grace, first = (1 if value is None else value for value in safe)
    return grace, first


def _budgets(text: str, grace: int, first: int) -> list[int | str]:
    from heedful.evaluation.kv_budget import check_budgets

    try:
        budgets: list[int | str] = [
            word if word == "full" else whole(word) for word in split("--kv-budget", text, str)
        ]
    except ValueError:
        raise UsageError(
            f"--kv-budget takes whole numbers and full, separated by commas, got {text!r}"
        ) from None
    try:
        check_budgets(budgets, 1, grace, first)
    except ValueError as error:
        raise UsageError(f"--kv-budget: {error}") from None
    return budgets


def _policies(text: str) -> tuple[str, ...]:
    policies = split("--policy", text, str)
    if not policies:
        raise UsageError(f"--policy takes names separated by commas, got {text!r}: {', '.join(POLICIES)}")
    try:
        for name in policies:
            get_policy(name)
    except ValueError as error:
        raise UsageError(f"--policy: {error}") from None
    return policies


def _evaluate(
    folder: Path,
    source: Path | None,
    data: str | None,
    text_column: str | None,
    context: int | None,
    budgets: list[int | str] | None,
    policies: tuple[str, ...] | None,
    safe: tuple[int | None, int | None],
    most: int | None,
    out: Path,
) -> None:
    from heedful.data import TokenDataset, count_bytes, token_bytes
    from heedful.evaluation.kv_budget import (
        BudgetResult,
        check_budgets,
        check_policies,
        default_policies,
        evaluate_budgets,
        to_csv,
    )
    from heedful.evaluation.plot import plot_budgets
    from heedful.hf.load import load_model, load_source, load_tokenizer
    from heedful.training import held_out

    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, expected a folder for the results; use another --out")
    console = Console(highlight=False)
    screen = Console(stderr=True, highlight=False)
    model = load_model(folder)
    if source is not None and source.resolve() == folder.resolve():
        raise UsageError(f"--source {source} is the model itself; name the stock model that it was made from")
    before = None if source is None else load_source(source)
    policies = policies or default_policies(model)
    try:
        check_policies(model, policies)
    except ValueError as error:
        raise UsageError(f"--policy: {error}") from None
    with spinner(screen, "reading the data"):
        tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
        held = held_out(folder, tokenizer, data, text_column=text_column, context=context)
        total = len(held.rows)
        n_rows = min(most or MOST_ROWS, total)
        spread = [i * total // n_rows for i in range(n_rows)]
        rows = TokenDataset({name: tensor[spread] for name, tensor in held.rows.tensors.items()})
        n_bytes = None
        if tokenizer is not None and held.n_bytes is not None:
            n_bytes = count_bytes(rows.tensors["labels"], token_bytes(tokenizer))
        is_text = n_bytes is not None
    saved = model.saved_eviction()
    grace, first = (
        given if given is not None else usual
        for given, usual in zip(safe, (saved.grace, saved.first), strict=True)
    )
    if budgets is None and model.config.model_type == "heedful":
        budgets = _budgets(USUAL, 1, 1)
    elif budgets is None:
        parts = {max(held.context // part, grace + first) for part in (8, 4, 2)}
        if isinstance(saved.budget, int) and saved.budget < held.context:
            parts.add(saved.budget)
        budgets = [*sorted(parts), "full"]
    try:
        check_budgets(budgets, model.config.num_hidden_layers, grace, first)
    except ValueError as error:
        raise UsageError(f"--kv-budget: {error}") from None
    out.mkdir(parents=True, exist_ok=True)

    part = "" if n_rows == total else f"{n_rows:,} of "
    measured_on = f"{held.name}, {part}{counted(total, 'row')} of {held.context:,} tokens"
    heading = measured_on
    if part and most is None:
        heading += f" (for all: --rows {total})"
    todo = sum(1 if budget == "full" else len(policies) for budget in budgets)
    results: list[BudgetResult] = []
    progress = _Progress(todo, n_rows, screen)
    try:
        with progress:
            for result in evaluate_budgets(
                model,
                rows,
                budgets,
                policies,
                grace=grace,
                first=first,
                source=before,
                n_bytes=n_bytes,
                batch_size=max(1, min(32, MOST_LOGITS // (held.context * model.config.vocab_size))),
                progress=progress.update,
            ):
                results.append(result)
                (out / FIGURE).unlink(missing_ok=True)  # an earlier one would not belong to this table
                write_text(out / TABLE, to_csv(results))
    except KeyboardInterrupt:
        if results:
            _print(results, heading, is_text, console)
        kept = f"those done are in {out / TABLE}" if results else "nothing was written"
        raise Interrupted(f"stopped after {len(results)} of {todo} measurements; {kept}") from None
    _print(results, heading, is_text, console)
    written = [out / TABLE]
    if any(r.policy is not None for r in results):
        plot_budgets(
            results,
            out / FIGURE,
            "Loss with a small cache" if is_text else "Answers that are right with a small cache",
            f"{measured_on}; {_form(model)}",
            "loss" if is_text else "accuracy",
        )
        written.append(out / FIGURE)
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


def _form(model: Any) -> str:
    config = model.config
    form = f"{config.attention} x {config.score}" if config.model_type == "heedful" else type(model).__name__
    return f"{form}, {counted(config.num_hidden_layers, 'layer')}"


class _Progress:
    """A bar over all measurements; where the output is no terminal, a line now and then."""

    def __init__(self, todo: int, n_rows: int, console: Console) -> None:
        self.todo, self.n_rows, self.console = todo, n_rows, console
        self.begun = self.done = 0
        self.last_line = time.perf_counter()
        self.bar = progress_bar(console, "place", counted=False)
        self.task = self.bar.add_task("", total=todo * n_rows, place="")

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self, policy: str | None, budget: Any, n_rows: int) -> None:
        """Some more rows are measured; 0 = a measurement begins."""
        self.begun += n_rows == 0
        self.done += n_rows
        what = "full cache" if policy is None else f"{policy}, {budget} tokens"
        place = f"{self.begun} of {self.todo}"
        self.bar.update(self.task, completed=self.done, description=what, place=place)
        if not self.console.is_terminal and time.perf_counter() - self.last_line > LINE_EVERY:
            self.last_line = time.perf_counter()
            share = self.done / (self.todo * self.n_rows)
            self.console.print(f"{what}  {place}  {share:.0%} of all rows")


def _print(results: Sequence[Any], heading: str, is_text: bool, console: Console) -> None:
    columns = [
        text("policy"),
        Column("tokens"),
        Column("loss"),
        Column("bits/byte" if is_text else "right"),
        Column("KL", optional=True),
        Column("same", optional=True),
        Column("bytes"),
        Column("tokens/s", optional=True),
    ]
    rows = [
        (
            r.policy or "full cache",
            f"{r.kept:g}" if r.policy is None else str(r.kv_budget),
            f"{r.loss:.4f}",
            f"{r.accuracy:.1%}" if r.bits_per_byte is None else f"{r.bits_per_byte:.4f}",
            f"{r.kl:.4f}",
            f"{r.agreement:.1%}",
            f"{r.cache_bytes:,}",
            f"{r.tokens_per_second:,.0f}",
        )
        for r in results
    ]
    last_of_policy = [i for i in range(len(results) - 1) if results[i].policy != results[i + 1].policy]
    console.print(heading, style="bold", soft_wrap=False)
    console.print(table(columns, rows, width=console.width, lines_after=last_of_policy))

"""`heedful budget`."""

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from heedful.attention.eviction import POLICIES, Eviction
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, parse, peek, positional
from heedful.errors import Interrupted
from heedful.files import write_json
from heedful.screen import Column, counted, spinner, table, text

DESCRIPTION = """Find how few tokens the cache of every layer may hold without the loss exceeding a target.

    heedful budget runs/a                           # as good as its full cache, within 0.01 nats per token
    heedful budget runs/a --baseline runs/b         # as good as another model with its full cache
    heedful budget converted --data my.txt --context 512 --rows 8 --kv-grace 16 --kv-first 4
    heedful generate runs/a "Once upon a time"      # uses the budgets

The greedy search of arXiv 2410.02703: every layer starts with the whole context; the budget of one layer is
lowered to about 3/4, where it adds least loss per token freed; a layer whose next step would exceed the target
stays; down to the tokens that never go. The search is fast because it keeps what enters each layer, so that a trial
in one layer runs only the layers from there on, and because it is lazy: the last measured damage of each layer
ranks them, only the best is measured again, and it is taken if it is still the best.

The validation rows (a document or a piece of one each) are cut into up to 8 stretches. Each gives a block of
neighbouring rows to the search, and the block after it, up to four times as long, to the report. The two never
share a row; the search chose the budgets to fit its rows, so believe the loss on the report rows. What enters each
layer stays in memory, rows x context x width x layers numbers: of a large converted model give few rows. Its layers
with a sliding window keep that window.

Writes budget.jsonl (every decision; the same command goes on from it), budget.png and
the budgets with their policy in config.json, which generate uses. The policy "selective" needs a model with --score
selective; the others go with any."""

LOG, FIGURE, CONFIG = "budget.jsonl", "budget.png", "config.json"


def run(arguments: Sequence[str]) -> int:
    """Search, go on with a search, or report on a finished one."""
    values = parse(
        "budget",
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
            flag("target_loss", float | None, None, "the highest loss allowed, nats per token"),
            flag(
                "baseline", str | None, None, "folder of a run whose loss with its full cache is the target"
            ),
            flag("tolerance", float, 0.01, "without a target: nats per token above the run's own full cache"),
            flag("policy", str, "selective", "which token is evicted: " + ", ".join(POLICIES)),
            flag(
                "context",
                int | None,
                None,
                "tokens in a row; the run's if left out, for a converted model 2048",
            ),
            flag("kv_grace", int, 1, "newest tokens that are never evicted"),
            flag("kv_first", int, 1, "first tokens that are never evicted"),
            flag("rows", int, 64, "rows to search on, at most; up to 4 times as many to report on"),
            flag("restart", bool, False, "forget an earlier search in the folder"),
        ],
        arguments,
    )
    _check(values, tolerance_given=bool(peek(arguments, "tolerance", "")))

    console = Console(stderr=True, highlight=False)
    try:
        return _budget(values, console)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on") from None


def _check(values: dict[str, Any], tolerance_given: bool) -> None:
    target, tolerance = values["target_loss"], values["tolerance"]
    if target is not None and values["baseline"] is not None:
        raise UsageError("--target-loss and --baseline both say what the target is; give one of them")
    if tolerance_given and (target is not None or values["baseline"] is not None):
        raise UsageError("--tolerance counts from the run's own loss; leave out --target-loss and --baseline")
    if target is not None and not 0 < target < math.inf:
        raise UsageError(f"--target-loss must be greater than 0 and finite, got {target}")
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"--tolerance must be 0 or more and finite, got {tolerance}")
    if values["policy"] not in POLICIES:
        raise UsageError(f"--policy must be one of {', '.join(POLICIES)}, got {values['policy']!r}")
    for name in ("kv_grace", "kv_first"):
        if values[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {values[name]}")
    least = values["kv_grace"] + values["kv_first"]
    if values["context"] is not None and values["context"] <= least:
        raise UsageError(
            f"--context must be more than the {least} tokens that never go, got {values['context']}"
        )
    if values["rows"] < 1:
        raise UsageError(f"--rows must be 1 or more, got {values['rows']}")


@dataclass(frozen=True)
class _Scores:
    """One line of the result."""

    name: str
    search_loss: float
    report_loss: float
    kept: float
    """Tokens per layer on average."""
    nbytes: int
    """Bytes of the cache for one sequence of a whole context."""


def _budget(values: dict[str, Any], console: Console) -> int:
    from heedful.evaluation import evaluate
    from heedful.evaluation.search import BudgetSearch, check_policy, ladder, split_rows
    from heedful.evaluation.search_log import SearchLog, weights_digest
    from heedful.hf.load import load_model
    from heedful.training import held_out

    folder, policy = Path(values["run"]), values["policy"]
    safe = {"grace": values["kv_grace"], "first": values["kv_first"]}
    if values["baseline"] is not None:
        _check_trained(folder)
    model = load_model(folder)
    check_policy(model, policy)
    baseline = load_model(values["baseline"]) if values["baseline"] is not None else None
    data: dict[str, Any] = {"text_column": values["text_column"], "context": values["context"]}
    held = held_out(folder, _tokenizer(folder), values["data"], **data)
    if baseline is not None:
        _check_baseline(folder, Path(values["baseline"]))
    search_rows, report_rows = split_rows(held.rows, values["rows"])

    target, target_name = values["target_loss"], "as given"
    with spinner(console, "loss with the full cache"):
        full = evaluate(model, search_rows).loss
        theirs = evaluate(baseline, search_rows).loss if baseline is not None else math.nan
    if baseline is not None:
        name = Path(values["baseline"]).name
        target, target_name = theirs, f"{name} ({_score_of(baseline)}) with its full cache"
    elif target is None:
        target, target_name = full + values["tolerance"], f"its own full cache + {values['tolerance']:g}"
    settings = {
        "data": held.name,
        "search_rows": search_rows.digest(),
        "rows": len(search_rows),
        "target": target,
        "baseline": weights_digest(Path(values["baseline"])) if baseline is not None else None,
        "policy": policy,
        "ladder": list(ladder(held.context, sum(safe.values()))),
        **safe,
        "model": weights_digest(folder),
    }
    log = SearchLog(folder / LOG, settings, values["restart"])
    target = log.settings["target"]
    progress = _Progress(console)
    try:
        search = BudgetSearch(
            model, search_rows, target, policy=policy, earlier=log.moves, watch=progress.measuring, **safe
        )
        console.print(
            f"[bold]data[/bold]   {held.name}: {counted(len(search_rows), 'row')} of {held.context} tokens to "
            f"search on, {len(report_rows)} to report on"
        )
        console.print(
            f"[bold]target[/bold] {target:.4f} nats/token: {target_name}; now {search.full_loss:.4f}"
        )
        if log.moves:
            done = sum(m.accepted for m in log.moves)
            console.print(
                f"{'finished before' if search.finished else 'going on'} after {counted(done, 'move')}"
            )
        progress.begin(search, done=sum(m.accepted for m in log.moves))
        for move in search.moves():
            log.append(move)
            progress.show(move)
    finally:
        progress.close()

    with spinner(console, "loss on the report rows"):
        free = [budget for i, budget in enumerate(search.budgets) if i not in search.fixed]
        own_full = evaluate(model, report_rows).loss
        own = evaluate(model, report_rows, kv_budget=search.eviction).loss
        scores = [
            _Scores("full cache", full, own_full, held.context, _cache_bytes(model, held, Eviction())),
            _Scores(
                "budgets",
                search.loss,
                own,
                sum(free) / len(free),
                _cache_bytes(model, held, search.eviction),
            ),
        ]
        if baseline is not None:
            loss = evaluate(baseline, report_rows).loss
            held_bytes = _cache_bytes(baseline, held, Eviction())
            scores.append(_Scores("baseline, full cache", theirs, loss, held.context, held_bytes))
    _plot(folder, _curve(log.moves, search), search, held, policy, target_name)
    out = Console(highlight=False)
    out.print(
        f"{counted(sum(m.accepted for m in log.moves), 'move')}, "
        f"{counted(sum(m.measured for m in log.moves), 'measurement')}"
    )
    _print_result(out, search, scores)
    _print_written(out, folder, search)
    return 0


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a run on text; None for a synthetic task."""
    from heedful.hf.load import load_tokenizer
    from heedful.training import TrainSettings
    from heedful.training.settings import SETTINGS

    path = folder / SETTINGS
    if path.exists() and TrainSettings.load(path).data.startswith("synthetic"):
        return None
    return load_tokenizer(folder)


def _check_trained(run: Path) -> None:
    from heedful.training.settings import SETTINGS

    if not (run / SETTINGS).exists():
        raise UsageError(
            f"--baseline compares runs of heedful train, {run} is none; give --target-loss, or --tolerance above "
            f"its own full cache"
        )


def _check_baseline(run: Path, baseline: Path) -> None:
    """Raise unless the losses of the two runs on the same rows can be compared."""
    from heedful.training import TrainSettings
    from heedful.training.settings import SETTINGS

    if not (baseline / SETTINGS).exists():
        raise FileNotFoundError(
            f"{baseline} holds no training run (no {SETTINGS}); expected what heedful train left"
        )
    own, theirs = (TrainSettings.load(folder / SETTINGS) for folder in (run, baseline))
    tasks = [s.data if s.data.startswith("synthetic") else "text" for s in (own, theirs)]
    if tasks[0] != tasks[1]:
        raise ValueError(
            f"{baseline} was trained on {tasks[1]} and {run} on {tasks[0]}; a baseline needs the same data"
        )
    if own.context != theirs.context:
        raise ValueError(
            f"{baseline} was trained with a context of {theirs.context} tokens and {run} with {own.context}; a "
            f"baseline needs the same context"
        )
    if tasks[0] == "text" and _vocabulary(run) != _vocabulary(baseline):
        raise ValueError(
            f"{baseline} has another tokenizer than {run}: losses per token of different tokens cannot be "
            f"compared; train the baseline on the same text with the same --tokenizer and --vocab-size"
        )


def _vocabulary(folder: Path) -> Any:
    """What makes tokens of text: all of tokenizer.json but how batches are padded and cut."""
    from heedful.hf.load import load_tokenizer

    load_tokenizer(folder)
    parts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {name: value for name, value in parts.items() if name not in ("padding", "truncation")}


def _score_of(model: Any) -> str:
    return "/".join(dict.fromkeys(score.config.form for score in model.scores))


@torch.no_grad()
def _cache_bytes(model: Any, held: Any, eviction: Eviction) -> int:
    """Bytes held after one sequence of a whole context, without room for tokens to come."""
    from heedful.evaluation.kv_budget import held_bytes

    cache = model.new_cache(eviction)
    model(held.rows.tensors["input_ids"][:1].to(model.device), past_key_values=cache)
    return held_bytes(cache)


class _Progress:
    """Where the search is: one live line, or a line per decision where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status: Any = None
        self.search: Any = None
        self.moves = 0

    def begin(self, search: Any, done: int) -> None:
        """Start to show `search`, which has made `done` moves."""
        self.search, self.moves = search, done
        if self.console.is_terminal and not search.finished:
            self.status = self.console.status(self._now("measuring every layer once"))
            self.status.start()

    def measuring(self, layer: int, budget: int) -> None:
        """Say what is being tried."""
        if self.status is not None:
            self.status.update(self._now(f"trying layer {layer} with {budget}"))

    def show(self, move: Any) -> None:
        """Report a decision."""
        self.moves += move.accepted
        if self.status is not None:
            self.status.update(self._now("choosing"))
        elif move.accepted:
            self.console.print(self._now(f"layer {move.layer} to {move.budget}", ";"), soft_wrap=True)
        else:
            self.console.print(
                f"layer {move.layer} stays at {self.search.budgets[move.layer]}: with {move.budget} the loss "
                f"would be {move.loss:.4f}",
                soft_wrap=True,
            )

    def close(self) -> None:
        """Take the live line off the screen."""
        if self.status is not None:
            self.status.stop()
            self.status = None

    def _now(self, doing: str, end: str = "\n ") -> str:
        s = self.search
        return (
            f"move {self.moves}: {doing}, loss {s.loss:.4f} of {s.target:.4f}, {s.memory_factor:.2f}x less{end} "
            f"{' '.join(map(str, s.budgets))}"
        )


def _curve(moves: Sequence[Any], search: Any) -> list[tuple[float, float]]:
    """(tokens per layer, loss) from the full cache through every accepted move."""
    budgets = {i: search.context for i in range(len(search.budgets)) if i not in search.fixed}
    points = [(float(search.context), search.full_loss)]
    for move in moves:
        if move.accepted:
            budgets[move.layer] = move.budget
            points.append((sum(budgets.values()) / len(budgets), move.loss))
    return points


def _plot(
    folder: Path,
    curve: list[tuple[float, float]],
    search: Any,
    held: Any,
    policy: str,
    target_name: str,
) -> None:
    from heedful.evaluation.search_plot import plot_search

    layers = counted(len(search.budgets), "layer")
    plot_search(
        folder / FIGURE,
        [kept for kept, _ in curve],
        [loss for _, loss in curve],
        search.target,
        target_label=f"target {search.target:.3f}: {target_name}",
        title=f"How few tokens {folder.name} needs",
        subtitle=f"{held.name}; {layers}, context {held.context}, policy {policy}, greedy search",
    )


def _print_result(console: Console, search: Any, scores: list[_Scores]) -> None:
    layers = [
        (
            str(i),
            str(budget),
            f"{budget / search.context:.0%}",
            "its sliding window"
            if i in search.fixed
            else "target"
            if i in search.frozen
            else "lowest budget",
        )
        for i, budget in enumerate(search.budgets)
    ]
    columns = [text("layer"), Column("budget"), Column(f"of {search.context}"), Column("stopped by")]
    console.print(table(columns, layers, width=console.width))
    rows = [
        (s.name, f"{s.search_loss:.4f}", f"{s.report_loss:.4f}", f"{s.kept:.1f}", f"{s.nbytes:,}")
        for s in scores
    ]
    heads = ("search\nloss", "report\nloss", "tokens\nper layer", "bytes per\nsequence")
    console.print(table([text(""), *map(Column, heads)], rows, width=console.width))
    full, own, *rest = scores
    other = rest[0] if rest else full
    whose = "the baseline with its full cache" if rest else "its full cache"
    console.print(
        f"{search.memory_factor:.2f}x fewer tokens than the full context; {other.nbytes / own.nbytes:.2f}x fewer "
        f"bytes than {whose}. On the report rows, which the search did not see, the loss is "
        f"{abs(own.report_loss - other.report_loss):.4f} nats per token "
        f"{'above' if own.report_loss > other.report_loss else 'below'} that of {whose}."
    )


def _print_written(console: Console, folder: Path, search: Any) -> None:
    written = [LOG, FIGURE]
    note = ""
    if all(b == search.context for b in search.budgets):
        note = f"{CONFIG} is unchanged: no budget could be lowered"
    else:
        path = folder / CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        place = (
            config["heedful"] if isinstance(config.get("heedful"), dict) else config
        )  # of a converted model
        place["eviction"] = search.eviction.to_dict()
        write_json(path, config, sort_keys=True)
        written.insert(0, f"{CONFIG} (eviction, which generate uses)")
    if note:
        console.print(note, soft_wrap=True)
    console.print(f"written in {folder}: {', '.join(written)}", soft_wrap=True)

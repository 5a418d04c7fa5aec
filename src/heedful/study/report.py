"""README.md and the figure of a study, from its raw data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from heedful.comparison.multiplier import multiplier, training_flops, written
from heedful.comparison.statistics import Interval, paired
from heedful.data.tasks import task_of
from heedful.files import write_text
from heedful.study.figure import draw, draw_caches
from heedful.study.plan import Contrast, Study
from heedful.study.rows import read_rows, read_runs, read_table
from heedful.study.sweep import sweep_section
from heedful.study.verdict import FAILS, HOLDS, OPEN, Verdict, value_of, verdicts
from heedful.training import RunResult
from heedful.training.settings import TrainSettings

Row = Mapping[str, Any]
VERDICTS = {
    HOLDS: ("holds", "hold"),
    FAILS: ("does not", "do not"),
    OPEN: ("is not resolved", "are not resolved"),
}
"""How one and how several are counted."""


def write_report(study: Study, out: Path, again: str | None = None) -> list[Verdict]:
    """Write `README.md` and `figure.png` of what is there; the verdicts.

    Args:
        study: what was tried.
        out: the folder of its rows, and of the page.
        again: the command that runs it again; None: that of a study in `FOLDER` whose results are in results/.
    """
    rows, timed = read_runs(out / "runs.jsonl"), out / "times.json"
    measured = read_table(timed, "seconds") if timed.exists() else {}
    times: Mapping[str, float] = measured.get("seconds", {})
    seeds, caches = [row for row in rows if row["role"] == "seed"], read_rows(out / "budgets.jsonl")
    found = verdicts(study, seeds, caches)
    parts = [
        f"# {study.title}",
        f"**Claim** ({study.source}): {study.claim}",
        _verdict_line(found) + _worth(study, found, rows) + _others(found),
        "![what came out](figure.png)",
        _declared(study, seeds),
        _machines(seeds, measured),
        _arms_table(study, seeds, times),
        _contrasts_table(study, found),
        sweep_section(study, read_rows(out / "sweep.jsonl")) if len(study.rates) > 1 else "",
        *_multipliers(study, rows, times),
        *_caches(study, caches),
        f"**What it cannot say.** {study.limits.strip()}" if study.limits else "",
        f"Raw data: {_raw_data(out)}. Again:",
        f"```bash\n{again or f'heedful study {study.name}{_how(study)}'} --workers 2\n```",
    ]
    write_text(out / "README.md", "\n\n".join(part for part in parts if part) + "\n")
    if seeds:
        draw(study, seeds, out / "figure.png")
    if caches:
        draw_caches(study, caches, seeds, out / "caches.png")
    return found


def _how(study: Study) -> str:
    """What else the command must say; of a file of one's own its name will do."""
    scale = "" if study.scale == "cpu" else f" --scale {study.scale}"
    return scale + ("" if study.data is None else f" --data {Path(study.data).name}")


def _raw_data(out: Path) -> str:
    """The files that are there, linked."""
    files = {
        "runs.jsonl": "",
        "sweep.jsonl": "the sweep of learning rates in ",
        "times.json": "seconds of a step in ",
        "study.json": "all settings in ",
    }
    return ", ".join(f"{what}[{name}]({name})" for name, what in files.items() if (out / name).exists())


def _verdict_line(found: Sequence[Verdict]) -> str:
    if not found:
        return "**Verdict: none yet**, no contrast has two seeds."
    first = found[0]
    which = "The first of its contrasts: " if len(found) > 1 else ""
    return f"**Verdict: {first.says}.** {which}{_sentence(first)}"


def _others(found: Sequence[Verdict]) -> str:
    """How many of the other contrasts hold."""
    counted = counted_verdicts(found[1:])
    return f" Of the other contrasts {counted}." if counted else ""


def counted_verdicts(found: Sequence[Verdict]) -> str:
    """How many hold, how many do not, how many are open."""
    counts = Counter(v.says.partition(",")[0] for v in found)
    return ", ".join(
        f"{counts[says]} {words[counts[says] > 1]}" for says, words in VERDICTS.items() if counts[says]
    )


def _sentence(v: Verdict) -> str:
    says = f"{v.contrast.says}: " if v.contrast.says else ""
    return f"{says}{sides(v.contrast, 'minus')} is {interval_text(v.difference)}, {v.seeds} paired seeds."


def sides(c: Contrast, word: str) -> str:
    """Two sides with a word between, with what caches, and in what if not in the metric of the study."""
    one, other = f"`{c.arm}`", f"`{c.against}`"
    if c.of_caches:
        one += _held(c.smaller, c.policy)
        other += _held(c.against_smaller, c.against_policy)
    return f"{one} {word} {other}" + (f" in {c.metric}" if c.metric else "")


def _held(smaller: int, policy: str | None) -> str:
    if smaller == 1:
        return " with a full cache"
    return f" with 1/{smaller} of it" + ("" if policy is None else f" ({policy})")


def interval_text(d: Interval) -> str:
    """A difference with its 95 % interval."""
    return f"{d.estimate:+.4f} (95 %: {d.low:+.4f} to {d.high:+.4f})"


def _declared(study: Study, seeds: Sequence[Row]) -> str:
    counted = Counter(row["arm"] for row in seeds)
    fewest, most = (of(counted.values(), default=0) for of in (min, max))
    there = str(most) if fewest == most else f"{fewest} to {most}, by arm,"
    baseline = study.arms[study.baseline]
    rates = ", ".join(f"{lr:g}" for lr in study.rates)
    swept = (
        f"learning rate of each arm from a sweep ({rates}) on a seed of its own"
        if len(study.rates) > 1
        else f"learning rate {rates} for all"
    )
    return (
        f"**Declared before the runs**: an effect of {study.effect:g} in {study.metric}; with an expected spread "
        f"of {study.spread:g} (standard deviation of paired differences) {study.needed} seeds find it in four of "
        f"five cases; {study.seeds} planned, {there} there. Unless an arm says otherwise: {baseline.data}, width "
        f"{baseline.d_model}, {baseline.n_layers} layers, {baseline.n_heads} heads, {_read_at_a_time(baseline)}, "
        f"{baseline.steps} steps of {baseline.batch_size} rows; {swept}; all arms start from the same logit scale "
        f"({baseline.init_logit_std:g}) and see the same rows in the same order."
    )


def _read_at_a_time(settings: TrainSettings) -> str:
    task = task_of(settings.data, settings.task_options)
    return f"context {settings.context}" if task is None else f"{task.fit(settings.context).length} tokens"


def _machines(seeds: Sequence[Row], measured: Mapping[str, Any]) -> str:
    """On what it ran."""
    devices = [str(name) for name in dict.fromkeys(row.get("device") for row in seeds) if name]
    if not devices:
        return ""
    said = f"**Trained on** {' and '.join(devices)}"
    taken = Counter(row["study"] for row in seeds if "study" in row)
    said += "".join(f"; {n} of {len(seeds)} runs are those of `{study}`" for study, n in taken.items())
    return said + (f"; steps timed on {measured['device']}." if measured else ".")


def _arms_table(study: Study, rows: Sequence[Row], times: Mapping[str, float]) -> str:
    task = any(row["accuracy_at"] for row in rows)
    base = {(row["arm"], row["seed"]): value_of(row, study.metric) for row in rows}
    there = [name for name in study.arms if any(row["arm"] == name for row in rows)]
    one_context = len({settings.context for settings in study.arms.values()}) == 1
    head = ["arm", "seeds", "parameters", "MFLOPs/token", "ms/step", "cache B/token", "lr", "loss"]
    head += ["right", "at 2x", "at 4x"] if task else []
    head.append(f"{study.metric} vs {study.baseline if one_context else 'the first of its context'}")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in there:
        own, beside = [row for row in rows if row["arm"] == name], _beside(study, name, there)
        first, losses = own[0], [row["val_loss"] for row in own]
        cells = [f"`{name}`", str(len(own)), f"{first['params']:,}", f"{first['flops_per_token'] / 1e6:.2f}"]
        cells += [f"{1000 * times[name]:.0f}" if name in times else "", f"{first['cache_bytes_per_token']:,}"]
        cells += [f"{first['lr']:g}", f"{mean(losses):.4f}"]
        if task:
            cells += [_mean_right(own, key) for key in ("1", "2", "4")]
        pairs = [
            value_of(row, study.metric) - base[beside, row["seed"]]
            for row in own
            if (beside, row["seed"]) in base
        ]
        cells.append("" if name == beside or len(pairs) < 2 else interval_text(paired(pairs)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_right(rows: Sequence[Row], times: str) -> str:
    values = [row["accuracy_at"][times] for row in rows if times in (row["accuracy_at"] or {})]
    return f"{mean(values):.1%}" if values else ""


def _contrasts_table(study: Study, found: Sequence[Verdict]) -> str:
    lines = [
        f"| contrast | claimed | {study.metric}, difference | seeds | verdict |",
        "|---|---|---|---|---|",
    ]
    for v in found:
        c = v.contrast
        what = sides(c, "vs") + (f": {c.says}" if c.says else "")
        lines.append(f"| {what} | {c.claims} | {interval_text(v.difference)} | {v.seeds} | **{v.says}** |")
    return "\n".join(lines)


def _worth(study: Study, found: Sequence[Verdict], rows: Sequence[Row]) -> str:
    """The compute multiplier of the arm that the verdict is about."""
    if not study.lengths or not found or found[0].contrast.against != study.baseline:
        return ""
    arm = found[0].contrast.arm
    own = [_result(row) for row in rows if row["arm"] == arm and row["role"] == "seed"]
    by_flops = multiplier(own, _baseline(study, rows), training_flops)
    if by_flops is None:
        return ""
    return f" Its compute, in FLOPs, is worth {written(by_flops)} of that of `{study.baseline}`."


def _result(row: Row) -> RunResult:
    names = RunResult.__dataclass_fields__
    return RunResult(**{name: value for name, value in row.items() if name in names})


def _baseline(study: Study, rows: Sequence[Row]) -> list[RunResult]:
    """Its runs, of every length."""
    return [_result(row) for row in rows if row["arm"] == study.baseline]


def _multipliers(study: Study, rows: Sequence[Row], times: Mapping[str, float]) -> list[str]:
    """What the baseline would have to spend for the loss of each arm."""
    if not study.lengths:
        return []

    def steps(run: RunResult) -> int:
        return int(run.config["train"]["steps"])

    baseline = _baseline(study, rows)
    lines = ["| arm | FLOPs | seconds |", "|---|---|---|"]
    for name in study.arms:
        own = [_result(row) for row in rows if row["arm"] == name and row["role"] == "seed"]
        if name == study.baseline or not own:
            continue
        seconds = {id(run): times.get(name, 0.0) for run in own} | {
            id(run): times[study.baseline] for run in baseline
        }
        by_flops = multiplier(own, baseline, training_flops)
        by_seconds = multiplier(own, baseline, lambda run, s=seconds: s[id(run)] * steps(run))  # type: ignore[misc]
        lines.append(f"| `{name}` | {written(by_flops)} | {written(by_seconds)} |")
    lengths = ", ".join(f"{n:,}" for n in sorted({*study.lengths, study.arms[study.baseline].steps}))
    what = (
        f"**Compute multiplier**: what `{study.baseline}` would have to spend for an arm's loss, over what the arm "
        f"spent; from {lengths} steps of `{study.baseline}`, each with its own schedule; 95 % interval by "
        f"bootstrap over seeds; seconds from steps measured in turns. Above 1 the arm saves compute, below 1 the "
        f"same compute is better spent on `{study.baseline}`."
    )
    return [what, "\n".join(lines)]


def _caches(study: Study, rows: Sequence[Row]) -> list[str]:
    """Small caches by arm and policy, and the smallest that is as good as another's full one."""
    if not rows:
        return []
    right = study.metric != "loss"
    name_of, worse = ("accuracy", "below") if right else ("loss", "above")

    def shown(value: float) -> str:
        return f"{value:.1%}" if right else f"{value:.4f}"

    kept = sorted({row["kv_budget"] for row in rows if row["policy"] is not None})
    lines = [
        "| arm | who goes | " + " | ".join(map(str, kept)) + " | full | as good as full |",
        "|---|---|" + "---|" * (len(kept) + 2),
    ]
    full = {
        name: mean(row[name_of] for row in rows if row["arm"] == name and row["policy"] is None)
        for name in study.arms
        if any(row["arm"] == name for row in rows)
    }
    for name in full:
        own = [row for row in rows if row["arm"] == name and row["policy"] is not None]
        other = _beside(study, name, list(full))
        for policy in dict.fromkeys(row["policy"] for row in own):
            losses = {
                budget: mean(found)
                for budget in kept
                if (found := [r[name_of] for r in own if (r["policy"], r["kv_budget"]) == (policy, budget)])
            }
            cells = [shown(losses[budget]) if budget in losses else "" for budget in kept]
            good = (
                b for b, value in losses.items() if (value >= full[other] if right else value <= full[other])
            )
            enough = next(good, None)
            context = study.arms[name].context
            told = "none" if enough is None else f"{enough} ({context / enough:.3g}x)"
            lines.append(f"| `{name}` | {policy} | {' | '.join(cells)} | {shown(full[name])} | {told} |")
    others = ", ".join(f"`{name}`" for name in dict.fromkeys(_beside(study, n, list(full)) for n in full))
    return [
        f"**{name_of.capitalize()} with small caches** (tokens held per layer, mean over seeds; [budgets.jsonl]"
        f"(budgets.jsonl)), on some held-out rows and not on all of them, as above: compare within this "
        "table. The figure adds what a small cache costs here to what the full one has above. As good as full: the "
        f"smallest of these caches whose {name_of} is not {worse} that of a full one of {others}"
        f"{' of the same context' if ',' in others else ''}, and how many times smaller it is.",
        "![loss against the bytes of a cache](caches.png)",
        "\n".join(lines),
    ]


def _beside(study: Study, arm: str, measured: Sequence[str]) -> str:
    """The first arm that reads as much at a time: whose full cache others are held against."""
    return next(name for name in measured if study.arms[name].context == study.arms[arm].context)

"""`heedful doctor RUN`: what a model's budget is, and the proof that it is active."""

from dataclasses import asdict
from typing import Any

from rich.console import Console

from heedful.attention.eviction import POLICIES, Eviction
from heedful.cli.errors import UsageError
from heedful.cli.parsing import kv_budget_of
from heedful.cli.wrapping import print_report
from heedful.screen import counted, progress_bar, spinner


def examine_run(folder: str, kv_budget: str | None, kv_policy: str | None, as_json: bool) -> int:
    """Print what is saved with the model in `folder`, prove that its budget is active, and print the proof.

    Raises:
        UsageError: for an unsound budget or an unknown policy.
        ValueError: if no budget is active.
    """
    budget = checked_budget(kv_budget, kv_policy)
    console = Console(stderr=True, highlight=False)
    with spinner(console, "loading the model"):
        from heedful.evaluation.proof import prove_budget
        from heedful.hf.load import load_model

        model = load_model(folder)
    facts = _facts(model, folder)
    if not as_json:
        print_report(facts, _fact_lines(facts))
    with progress_bar(console) as bar:
        task = bar.add_task("", total=None)
        proof = prove_budget(
            model,
            budget,
            kv_policy,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    proved = {**asdict(proof), "eviction": proof.eviction.to_dict()}
    if as_json:
        print_report({**facts, "proof": proved}, None)
    else:
        print_report(proved, _proof_lines(proved))
    return 0


def checked_budget(kv_budget: str | None, kv_policy: str | None) -> Any:
    """The budget that is meant, None where none is given.

    Raises:
        UsageError: for an unsound budget or an unknown policy.
    """
    budget = kv_budget_of(kv_budget)
    if kv_policy is not None and kv_policy not in POLICIES:
        raise UsageError(f"--kv-policy must be one of {', '.join(POLICIES)}, got {kv_policy!r}")
    try:
        Eviction.of(budget)
    except ValueError as error:
        raise UsageError(f"--kv-budget: {error}") from None
    return budget


def _facts(model: Any, folder: str) -> dict[str, Any]:
    """What kind of model it is, what is saved with it, and who votes in it."""
    scores = model.scores
    saved = model.resolve_eviction()
    return {
        "folder": folder,
        "model_type": model.config.model_type,
        "layers": model.config.num_hidden_layers,
        "saved": saved.to_dict() if saved.evicts else None,
        "scores": list(dict.fromkeys(_who_votes(score) for score in scores)),
        "layers_without_window": len(scores),
        "silent_layers": sum(score.silent for score in scores),
    }


def _who_votes(score: Any) -> str:
    config = score.config
    if config.form != "selective":
        return f"{config.form}: nobody votes"
    who = "attention head 0"
    if config.selector != "head":
        per = "for the layer" if config.selectors == 1 else f"for each of {config.selectors} key heads"
        what = (
            f"an added selection head of {config.select_dim}" if config.selector == "added" else "a retention"
        )
        who = f"{what} {per}"
    what = "are subtracted from the logits" if config.subtract else "only say who goes"
    return f"selective: {who}; votes {what}"


def _fact_lines(facts: dict[str, Any]) -> list[str]:
    saved = None if facts["saved"] is None else Eviction.of(facts["saved"])
    shown = [
        f"{facts['folder']}: {facts['model_type']}, {counted(facts['layers'], 'layer')}",
        f"  {'saved':<16} {'no budget' if saved is None else _asked(saved)}",
    ]
    shown += [f"  {'score':<16} {score}" for score in facts["scores"]]
    silent, own, layers = facts["silent_layers"], facts["layers_without_window"], facts["layers"]
    if silent:
        where = "all votes are zero" if silent == own else f"the votes of {silent} of {own} layers are zero"
        shown.append(f"  {'votes':<16} {where}: not adapted yet, ranks by age")
    if own < layers:
        slide = "1 layer has" if layers - own == 1 else f"{layers - own} layers have"
        shown.append(f"  {'windows':<16} {slide} a sliding window, not counted here")
    return shown


def _asked(eviction: Eviction) -> str:
    """An eviction in words."""
    budget = eviction.budget
    held = f"{', '.join(map(str, budget))} tokens, by layer" if isinstance(budget, tuple) else ""
    if isinstance(budget, int):
        held = f"{budget:,} tokens in each layer"
    words = [held] if held else []
    if eviction.threshold is not None:
        words.append(f"tokens with more than {eviction.threshold:g} votes go")
    words.append(f"who goes: {eviction.policy}")
    if (eviction.grace, eviction.first) != (1, 1):
        words.append(f"the newest {eviction.grace} and the first {eviction.first} never")
    if eviction.evict_every > 1:
        words.append(f"at every {eviction.evict_every} tokens")
    return "; ".join(words)


def _proof_lines(proof: dict[str, Any]) -> list[str]:
    layers = len(proof["held"])
    where = "its layer" if layers == 1 else f"each of {layers} layers"
    return [
        f"  {'asked for':<16} {_asked(Eviction.of(proof['eviction']))}",
        f"  {'read':<16} {proof['read']:,} tokens in float32, of which {proof['generated'] - 1} it generated",
        f"  {'held':<16} {_range(proof['held'])} tokens in {where}",
        f"  {'evicted':<16} {_range(proof['evicted'])} tokens from {'it' if layers == 1 else 'each'}",
        f"  {'bytes':<16} {proof['nbytes']:,}, where a full cache has {proof['full_bytes']:,}",
        f"  {'tokens':<16} {proof['generated']} generated, as one pass with the eviction mask says "
        f"(logits differ by {proof['difference']:.1g})",
        f"  {'full cache':<16} its logits differ by {proof['effect']:.2g}: what was evicted is not seen",
        "a budget is active",
    ]


def _range(counts: Any) -> str:
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"

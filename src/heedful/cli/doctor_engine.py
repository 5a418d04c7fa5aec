"""`heedful doctor RUN --engine vllm`: the proof that the engine keeps to a model's budget, and answers alike."""

from dataclasses import asdict
from typing import Any

from rich.console import Console

from heedful.cli.doctor_run import checked_budget
from heedful.cli.serve import INSTALL, missing_for_serving
from heedful.cli.wrapping import print_report
from heedful.screen import spinner


def examine_engine(folder: str, kv_budget: str | None, kv_policy: str | None, as_json: bool) -> int:
    """Start the engine, and print the proof.

    Raises:
        UsageError: for an unsound budget or an unknown policy.
        ImportError: if the engine is missing.
        ValueError: if no budget is active, or an answer differs.
    """
    budget = checked_budget(kv_budget, kv_policy)
    if missing := missing_for_serving():
        raise ImportError(f"heedful doctor --engine vllm needs {missing}: {INSTALL}")
    from heedful.evaluation.engine import prove_engine

    with spinner(Console(stderr=True, highlight=False), "the engine starts, and answers"):
        proof = prove_engine(folder, budget, kv_policy)
    print_report(asdict(proof), None if as_json else _lines(folder, asdict(proof)))
    return 0


def _lines(folder: str, proof: dict[str, Any]) -> list[str]:
    close = f", {proof['near_ties']} after a near tie" if proof["near_ties"] else ""
    lengths = f"{proof['shortest']:,} to {proof['longest']:,} tokens"
    return [
        f"{folder}, in vLLM {proof['version']}",
        f"  {'prompts':<12} {proof['prompts']} side by side, of {lengths}",
        f"  {'tokens':<12} {proof['answers']} of {proof['prompts']} answers are those of generate{close}",
        f"  {'read':<12} {proof['seen']:,} tokens",
        f"  {'held':<12} at most {proof['held']:,} by any layer of any request, where {proof['budget']:,} may be",
        f"  {'evicted':<12} {proof['evicted']:,} tokens",
        f"  {'bytes':<12} {proof['bytes_per_request']:,} for each request, however long",
        "the engine keeps to the budget",
    ]

"""The proof that an engine keeps to a budget: its counts, and its answers beside those of `generate`."""

import random
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from heedful.hf.load import load_model

ANSWER = 16
"""Tokens of an answer."""
PROMPTS = 8
TIE = 1e-3
"""Two tokens whose log-probabilities are nearer than this may change places by rounding."""


@dataclass(frozen=True)
class EngineProof:
    """What the engine did."""

    version: str
    prompts: int
    shortest: int
    """Tokens of the shortest prompt."""
    longest: int
    answers: int
    """Answers that are, token by token, those of `generate`; up to a near tie."""
    near_ties: int
    """Those that part at two tokens equally likely but for rounding."""
    seen: int
    evicted: int
    held: int
    """The most tokens that any layer of any request ever held, counted in its memory."""
    budget: int
    bytes_per_request: int


def prove_engine(folder: str, kv_budget: Any = None, kv_policy: str | None = None) -> EngineProof:
    """Start vLLM with the model in `folder`, in float32, let it answer, and compare.

    Raises:
        ValueError: if no budget is saved or given, nothing was evicted, a layer held too much, or an answer
            differs.
    """
    from heedful_vllm.doctor import ask  # type: ignore[import-not-found]

    model = load_model(folder).float()
    eviction = model.resolve_eviction(kv_budget=kv_budget, kv_policy=kv_policy)
    if eviction.budget is None:
        raise ValueError(
            f"no budget is saved in {folder} or given: nothing bounds its memory; give --kv-budget"
        )
    budgets = [b for b in eviction.budgets(model.config.num_hidden_layers) if b is not None]
    most = int(model.config.max_position_embeddings) - ANSWER
    if most <= max(budgets):
        raise ValueError(
            f"nothing can be evicted: the model reads {most + ANSWER:,} tokens, and a layer holds "
            f"{max(budgets):,}; give a smaller --kv-budget"
        )
    draw = random.Random(0)
    lengths = [min(most, n) for n in (1, max(budgets) // 2, max(budgets) + 1, 2 * max(budgets))]
    lengths += [draw.randint(1, min(most, 3 * max(budgets))) for _ in range(PROMPTS - len(lengths))]
    lengths = [max(1, n) for n in lengths]
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths]
    expected = [_answer(model, prompt, eviction) for prompt in prompts]
    del model
    options = {"kv_budget": eviction.to_dict()["budget"], "kv_policy": eviction.policy}
    options |= {
        "kv_grace": eviction.grace,
        "kv_first": eviction.first,
        "kv_evict_every": eviction.evict_every,
    }
    with tempfile.TemporaryDirectory() as place:
        answers, counts, version = ask(folder, prompts, options, ANSWER, place)
    near, alike = 0, 0
    for (tokens, likely), want in zip(answers, expected, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(tokens, want, strict=True)) if a != b), None)
        tie = (
            at is not None and want[at] in likely[at] and likely[at][tokens[at]] - likely[at][want[at]] < TIE
        )
        near += tie
        alike += at is None or tie
    proof = EngineProof(
        version=version,
        prompts=len(prompts),
        shortest=min(lengths),
        longest=max(lengths),
        answers=alike,
        near_ties=near,
        seen=int(counts["heedful_tokens_seen_total"]),
        evicted=int(counts["heedful_tokens_evicted_total"]),
        held=int(counts["heedful_tokens_held_most"]),
        budget=max(budgets) + eviction.evict_every - 1,
        bytes_per_request=int(counts["heedful_bytes_per_request"]),
    )
    if alike < len(prompts):
        raise ValueError(
            f"{len(prompts) - alike} of {len(prompts)} answers of the engine are not those of generate"
        )
    if proof.held > proof.budget:
        raise ValueError(
            f"a layer held {proof.held} tokens in the engine, where the budget is {proof.budget}"
        )
    if proof.held < max(budgets):
        raise ValueError(
            f"no layer held more than {proof.held} tokens in the engine, of a budget of {max(budgets)}"
        )
    if not proof.evicted and eviction.evict_every == 1 and eviction.threshold is None:
        raise ValueError("the engine evicted nothing")
    return proof


@torch.no_grad()
def _answer(model: Any, prompt: list[int], eviction: Any) -> list[int]:
    """What `generate` continues a prompt with, by the likeliest tokens."""
    ids = torch.tensor([prompt])
    more = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), kv_budget=eviction, **more)
    return out[0, len(prompt) :].tolist()

"""Random language models of every form, run at once, token by token, and in random pieces: the same logits."""

import random
from pathlib import Path
from typing import Any

import torch
from tests.adversary.attack import Attack, Broken, Case
from torch import Tensor

from heedful import Decoder
from heedful.attention import EvictableScore, EvictingCache
from heedful.attention.eviction import POLICIES
from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.hf import HeedfulConfig, HeedfulForCausalLM

TOLERANCE, GENERATED = 1e-9, 1e-6
"""Of a logit, of the largest; everything is float64, but generate hands its logits out in float32."""
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "sas": {
        "sim_heads": [4, 8, 12],
        "sim_head_dim": [8, 16],
        "kernel_size": [1, 3, 5],
        "cache": ["expanded", "compact"],
    },
    "sas_linear": {"sim_heads": [4, 8, 12], "kernel_size": [1, 3]},
    "mla": {"kv_lora_rank": [4, 12], "q_lora_rank": [None, 6], "rope_head_dim": [2, 4]},
    "tpa": {"q_rank": [1, 3], "k_rank": [1, 2], "v_rank": [1, 2]},
    "selective": {
        "selector": ["head", "head", "added", "retention"],
        "selectors": [1, 2],
        "select_dim": [3, 8],
        "subtract": [True, False],
        "impl": ["auto", "reference", "sdpa", "blocked", "native"],
    },
    "forgetting": {"gate_bias": [0.0, 3.0]},
    "sigmoid": {"bias_length": [None, 16]},
}
"""What the forms are given beside nothing; others, also those of tomorrow, are tried as they are."""


def start(folder: Path) -> Case:
    torch.set_num_threads(1)
    return case


def case(draw: random.Random, place: Path) -> str:
    """One model, with a full cache or one that evicts."""
    torch.manual_seed(draw.randrange(2**31))
    fields = random_fields(draw)
    try:
        model = Decoder(**fields).double().eval()
    except ValueError as refused:  # not everything composes; it says so
        return f"refused: {str(refused).split(',')[0][:60]}" if len(str(refused)) > 20 else "refused"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # nothing is at its start any more
    length = draw.randint(1, 26)
    # no token twice: without positions their keys are equal, and rounding says who goes first
    ids = torch.stack([torch.randperm(fields["vocab_size"])[:length] for _ in range(draw.choice([1, 2]))])
    mask = torch.ones_like(ids, dtype=torch.bool)
    if draw.random() < 0.5:
        mask[0, : draw.randrange(length)] = False
    form = f"{fields['attention']} x {fields['score']}"
    evictable = all(isinstance(layer.attention.score, EvictableScore) for layer in model.layers)
    how = random_eviction(draw, fields) if evictable and draw.random() < 0.6 else None
    if how is None:
        with torch.no_grad():
            whole = model(ids, key_mask=mask)
    else:
        try:
            whole = piecewise(model, ids, mask, [length], how)
        except ValueError as refused:
            return f"{form}, {how['policy']} refused: {str(refused)[:60]}"
    for sizes in ([1] * length, random_pieces(draw, length)):
        pieces = piecewise(model, ids, mask, sizes, how)
        close(f"{fields}, {how}, in pieces of {sizes}", pieces[mask], whole[mask])
    if how is not None and how["budget"] is not None and how["budget"] >= length and how["threshold"] is None:
        with torch.no_grad():
            close(f"{fields}, {how}, room for all", model(ids, key_mask=mask)[mask], whole[mask])
    if draw.random() < 0.3 and isinstance(fields["attention"], str):
        generates(draw, model, fields, how)
    return f"{form}, {'full cache' if how is None else how['policy']}"


def random_fields(draw: random.Random) -> dict[str, Any]:
    """A small decoder; sometimes every layer has a form of its own."""
    n_layers = draw.choice([1, 2, 3])
    fields: dict[str, Any] = {
        "vocab_size": draw.choice([26, 64]),
        "d_model": draw.choice([16, 32]),
        "n_layers": n_layers,
        "n_heads": 4,
        "head_dim": draw.choice([None, 6, 8]),
        "block": draw.choice(["llama", "gpt"]),
        "positions": draw.choice(["rope", "rope", "learned", "none"]),
        "max_positions": 64,
        "qk_norm": draw.choice([None, None, False]),
        "attention_bias": draw.choice([False, True]),
        "tie_embeddings": draw.choice([True, False]),
        "init_logit_std": draw.choice([0.5, 2.0]),
    }
    for kind, registry in (("attention", ATTENTIONS), ("score", SCORES)):
        names = [draw.choice(list(registry.forms)) for _ in range(n_layers if draw.random() < 0.2 else 1)]
        options = [random_options(draw, name) for name in names]
        alone = len(names) == 1
        fields |= {kind: names[0] if alone else names, f"{kind}_options": options[0] if alone else options}
    if "gqa" in fields["attention"] or draw.random() < 0.1:
        fields["n_kv_heads"] = draw.choice([1, 2, 4])
    return fields


def random_options(draw: random.Random, name: str) -> dict[str, Any]:
    """Of one form, each given or left out."""
    known = OPTIONS.get(name, {})
    return {option: draw.choice(values) for option, values in known.items() if draw.random() < 0.5}


def random_eviction(draw: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    """What an `EvictingCache` is made with."""
    policy = draw.choice(list(POLICIES))
    if "selective" in fields["score"] and draw.random() < 0.5:
        policy = "selective"
    grace, first = draw.choice([(1, 1), (1, 1), (3, 1), (1, 3)])
    threshold = draw.choice([None, None, 0.5, 4.0]) if policy == "selective" else None
    budget = max(draw.randint(2, 12), grace + first)
    return {
        "budget": None if threshold is not None and draw.random() < 0.3 else budget,
        "policy": policy,
        "evict_every": draw.choice([1, 1, 2, 3]),
        "threshold": threshold,
        "grace": grace,
        "first": first,
    }


def random_pieces(draw: random.Random, length: int) -> list[int]:
    pieces: list[int] = []
    while sum(pieces) < length:
        pieces.append(min(draw.choice([1, 2, 3, 5, 9]), length - sum(pieces)))
    return pieces


@torch.no_grad()
def piecewise(
    model: Decoder, ids: Tensor, mask: Tensor, sizes: list[int], how: dict[str, Any] | None
) -> Tensor:
    """The logits of one pass through caches, `sizes` tokens at a time."""
    caches = model.new_cache() if how is None else [EvictingCache(**how) for _ in model.layers]
    pieces = zip(ids.split(sizes, 1), mask.split(sizes, 1), strict=True)
    return torch.cat([model(part, key_mask=real, caches=caches) for part, real in pieces], 1)


def generates(
    draw: random.Random, model: Decoder, fields: dict[str, Any], how: dict[str, Any] | None
) -> None:
    """transformers' generate takes the token that the decoder, fed all tokens so far, says is next."""
    names = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    names |= {"n_kv_heads": "num_key_value_heads", "max_positions": "max_position_embeddings"}
    names |= {"tie_embeddings": "tie_word_embeddings"}
    theirs = HeedfulForCausalLM(HeedfulConfig(**{names.get(n, n): x for n, x in fields.items()}))
    theirs = theirs.double().eval()
    state = model.state_dict()
    missing, unexpected = theirs.load_state_dict(
        {n if n.startswith("lm_head") else f"model.{n}": w for n, w in state.items()}, strict=False
    )
    if unexpected or any("lm_head" not in name for name in missing):
        raise Broken(f"{fields}: weights do not go over: {missing}, {unexpected}")
    theirs.tie_weights()
    kv = {f"kv_{n}": x for n, x in (how or {}).items()}
    prompt = torch.randperm(fields["vocab_size"])[None, : draw.randint(1, 12)]
    more: dict[str, Any] = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "pad_token_id": 0,
        "no_repeat_ngram_size": 1,
    }
    more |= {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    out = theirs.generate(prompt, output_logits=True, return_dict_in_generate=True, **more, **kv)
    ids = out.sequences[:, :-1]
    whole = piecewise(model, ids, torch.ones_like(ids, dtype=torch.bool), [ids.shape[1]], how)
    close(f"generate: {fields}, {how}", torch.cat(out.logits), whole[0, prompt.shape[1] - 1 :], GENERATED)


def close(what: str, got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal, relative to the largest logit, and finite."""
    if not got.isfinite().all():
        raise Broken(f"{what}: not finite")
    apart = float((got - expected).abs().max()) if got.numel() else 0.0
    if apart > tolerance * max(1.0, float(expected.abs().max()) if got.numel() else 1.0):
        raise Broken(f"{what}: logits are {apart:.3g} apart")


ATTACK = Attack(
    "models",
    "random decoders of every attention and score: at once, token by token, in pieces, `generate`; "
    "full and bounded caches",
    0.15,
    start,
)

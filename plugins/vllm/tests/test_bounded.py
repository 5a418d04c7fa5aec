"""Many requests in one pass, as an engine schedules them: each gets the tokens that it would get alone.

The engine is a few lines here: blocks of bytes, prompts read in pieces, decoding steps of all who can, requests
that lose their block and start anew, and blocks that are copied to another place, as prefix caching does.
"""

import random
from typing import Any

import pytest
import torch
from tests.hf.converted.conftest import config_of
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import heedful
from heedful.attention.eviction import Eviction
from heedful.hf import HeedfulConfig, HeedfulForCausalLM
from heedful_vllm.batch import Batch, Piece
from heedful_vllm.bounded import Bounded

VOCAB = 97


def trained(attention: str = "gqa", score: str = "selective", **more: Any) -> Any:
    more = {"num_key_value_heads": 2, **more} if attention == "gqa" else more
    options: dict[str, Any] = {"attention": attention, "score": score, "vocab_size": VOCAB, "hidden_size": 32}
    options |= {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = HeedfulForCausalLM(HeedfulConfig(**options, **more))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def converted(family: str = "llama", **how: Any) -> Any:
    torch.manual_seed(0)
    config = config_of(family)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = heedful.patch(model, **how)
    if "moe" in family:
        model.set_experts_implementation("eager")  # the others have no float64
    for name, parameter in model.named_parameters():
        if ".score." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Request:
    def __init__(self, prompt: list[int], longest: int) -> None:
        self.tokens, self.n_prompt, self.longest = list(prompt), len(prompt), longest
        self.seen, self.block = 0, -1

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.longest


@torch.no_grad()
def serve(own: Bounded, requests: list[Request], seed: int, n_blocks: int = 4) -> None:
    """Schedule at random until all have their tokens."""
    draw = random.Random(seed)
    own.blocks.bind(torch.randint(0, 255, (n_blocks + 1, own.layout.nbytes), dtype=torch.uint8))
    free = list(range(1, n_blocks + 1))
    while waiting := [r for r in requests if not r.done]:
        for request in waiting:
            if request.block < 0 and free:
                request.block = free.pop(draw.randrange(len(free)))
        running = [r for r in waiting if r.block >= 0]
        if draw.random() < 0.1:  # preempted: its memory is lost
            victim = draw.choice(running)
            free.append(victim.block)
            victim.block, victim.seen = -1, 0
            running.remove(victim)
        if running and free and draw.random() < 0.2:  # moved, as snapshots are
            moved, place = draw.choice(running), free.pop(0)
            own.blocks.pages[place].copy_(own.blocks.pages[moved.block])
            own.blocks.pages[moved.block].random_(0, 255)
            free.append(moved.block)
            moved.block = place
        draw.shuffle(running)
        pieces, ids, positions, at = [], [], [], 0
        for request in running:
            n = min(len(request.tokens) - request.seen, draw.choice([1, 2, 7, 40, 300]))
            pieces.append(Piece(at, n, request.seen, request.block))
            ids += request.tokens[request.seen : request.seen + n]
            positions += range(request.seen, request.seen + n)
            at += n
        if not pieces:
            continue
        hidden = own.forward(torch.tensor(ids), torch.tensor(positions), Batch(pieces, torch.device("cpu")))
        for request, piece in zip(running, pieces, strict=True):
            request.seen += piece.length
            expected = [min(request.seen, budget) for budget in own.budgets]
            held = own.held(request.block)
            assert all(h <= e + own.eviction.evict_every - 1 for h, e in zip(held, expected, strict=True))
            if request.seen == len(request.tokens):
                logits = own.logits(hidden[piece.start + piece.length - 1][None])
                request.tokens.append(int(logits.argmax()))
                if request.done:
                    free.append(request.block)
                    request.block = -1


CASES = {
    "llama, retention": (converted, {}, {}),
    "llama, retention per key head": (converted, {"per": "kv_head"}, {}),
    "llama, votes": (converted, {"selector": "added"}, {}),
    "llama, votes per key head": (converted, {"selector": "added", "per": "kv_head"}, {}),
    "llama, head 0": (converted, {"selector": "head"}, {}),
    "llama, softmax": (converted, {"score": "softmax"}, {"policy": "streaming"}),
    "llama, sas": (converted, {"attention": "sas"}, {}),
    "gpt2": (converted, {"family": "gpt2"}, {}),
    "gpt_neox, first and newest": (converted, {"family": "gpt_neox"}, {"grace": 4, "first": 2}),
    "phi3": (converted, {"family": "phi3"}, {}),
    "qwen3_moe": (converted, {"family": "qwen3_moe"}, {}),
    "mha": (trained, {"attention": "mha"}, {}),
    "gqa, a budget per layer": (trained, {}, {"budget": [6, 30, 12]}),
    "mqa, now and then": (trained, {"attention": "mqa"}, {"evict_every": 3}),
    "gqa, threshold": (trained, {}, {"threshold": 0.5}),
    "sas": (trained, {"attention": "sas"}, {}),
    "mla": (trained, {"attention": "mla"}, {}),
    "gqa, h2o": (trained, {"score": "softmax"}, {"policy": "h2o"}),
    "gqa, no budget": (trained, {}, {"budget": None}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_each_gets_what_it_would_get_alone(case: str, seed: int):
    make, how, rest = CASES[case]
    model = make(**how).double()
    draw = random.Random(seed)
    eviction = Eviction.of({"budget": 12, **rest})
    own = Bounded(model, eviction, 256)
    requests = []
    for n in (1, 3, draw.randint(10, 30), draw.randint(40, 90), 215):
        requests.append(Request([draw.randrange(3, VOCAB) for _ in range(n)], n + draw.randint(5, 30)))
    serve(own, requests, seed)
    for request in requests:
        ids = torch.tensor([request.tokens[: request.n_prompt]])
        more = {
            "max_new_tokens": request.longest - request.n_prompt,
            "do_sample": False,
            "eos_token_id": None,
        }
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), kv_budget=eviction, pad_token_id=0, **more
        )
        assert alone[0].tolist() == request.tokens, f"{request.n_prompt} tokens"

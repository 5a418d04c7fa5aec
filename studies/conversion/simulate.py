"""A stock llama under any eviction: whatever ranks the keys, the stepwise rule decides, all heads of a group alike.

    python studies/conversion/simulate.py MODEL TEXT --context 1024 --texts 2 --budgets 128 256

MODEL is a stock checkpoint (SmolLM2-135M: `heedful convert SmolLM2.gguf a`, `heedful convert a MODEL --back`).
Measures recency, H2O, TOVA and an oracle that knows the attention of the future, as KL to the full cache with the
text given. TEXT is read from its third on. Appends to measured.jsonl. All T x T weights are in memory.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

import heedful
from heedful.attention.eviction import Eviction
from heedful.hf.names import CACHE
from heedful.ops.eviction import Rule, departures


class Seen(NamedTuple):
    """What one layer sees of one text."""

    layer: int
    x: Tensor
    """(T, C), the layer's input."""
    weights: Tensor
    """(H, T, T), the attention weights with every key there."""
    groups: int
    """Key/value heads."""


Ranking = Callable[[Seen], Tensor]
"""(R, T, T): for each query what it would evict first; R = 1, or one per key/value head."""


class Simulated:
    """A stock model whose attention is ours to watch and to cut."""

    def __init__(self, folder: str | Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=NAME).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        for layer in self.model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._keep, with_kwargs=True)
        self.inputs: dict[int, Tensor] = {}

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.inputs[int(module.layer_idx)] = x[0]  # type: ignore[arg-type]

    @torch.no_grad()
    def run(self, ids: Tensor, see: Callable[[Seen], Tensor | None] | None = None) -> Tensor:
        """Log-probabilities (T, V) of a text (T,); `see` may say which keys (H, T, T) each query has."""
        with _seeing(self, see):
            return self.model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)


def evicting(ranking: Ranking, rule: Rule) -> Callable[[Seen], Tensor]:
    """The keys that are left when the rule evicts by a ranking."""

    def left(seen: Seen) -> Tensor:
        length = seen.x.shape[0]
        positions, ranks = torch.arange(length)[None], ranking(seen)
        alive = []
        for rank in ranks:
            gone_at = departures(rule, rank[None].contiguous(), positions)[0]
            alive.append(torch.arange(length)[:, None] < gone_at)
        return torch.stack(alive).repeat_interleave(len(seen.weights) // len(alive), 0)

    return left


def recency(seen: Seen) -> Tensor:
    """The oldest goes."""
    length = seen.x.shape[0]
    return -torch.arange(length).float().expand(1, length, length)


def oracle(reduce: str, apart: bool) -> Ranking:
    """What the future pays least attention to goes: its sum, or its maximum, over heads and later queries."""

    def rank(seen: Seen) -> Tensor:
        groups = seen.groups if apart else 1
        paid = seen.weights.unflatten(0, (groups, -1))
        if reduce == "sum":
            return -paid.sum(1).flip(1).cumsum(1).flip(1)
        return -paid.amax(1).flip(1).cummax(1).values.flip(1)

    return rank


NAME = "simulated"
_at_work: list[tuple[Simulated, Callable[[Seen], Tensor | None] | None]] = []


@contextmanager
def _seeing(model: Simulated, see: Callable[[Seen], Tensor | None] | None) -> Iterator[None]:
    _at_work.append((model, see))
    try:
        yield
    finally:
        _at_work.pop()


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float = 1.0, **rest: Any
) -> tuple[Tensor, None]:
    model, see = _at_work[-1]
    heads, groups, length = q.shape[1], k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    if see is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2), None
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    logits = (q @ k.mT * scaling)[0].masked_fill(~causal, -torch.inf)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    weights = logits.softmax(-1)
    alive = see(Seen(layer, model.inputs[layer], weights, groups))
    if alive is not None:
        weights = logits.masked_fill(~alive, -torch.inf).softmax(-1)
    return (weights @ v[0])[None].transpose(1, 2), None


AttentionInterface.register(NAME, _attend)


def texts_of(tokenizer: Any, path: str, context: int, n: int) -> Tensor:
    """(n, context), from the middle of a file on."""
    text = Path(path).read_text(encoding="utf-8")
    ids = tokenizer(text[len(text) // 3 :][: n * context * 8])["input_ids"][: n * context]
    return torch.tensor(ids).view(n, context)


def measure(
    model: Simulated, texts: Tensor, full: list[Tensor], ranking: Ranking, rule: Rule
) -> dict[str, Any]:
    """`figures` of a ranking."""
    started = time.perf_counter()
    got = [model.run(ids, evicting(ranking, rule)) for ids in texts]
    assert rule.budget is not None
    return figures(full, got, rule.budget, time.perf_counter() - started)


def figures(full: list[Tensor], got: list[Tensor], budget: int, seconds: float) -> dict[str, Any]:
    """KL to the full cache: over all tokens, over those beyond the budget, and in the last quarter."""
    pairs = list(zip(full, got, strict=True))
    curve = torch.stack([(a.exp() * (a - b)).sum(-1) for a, b in pairs]).mean(0)
    same = torch.stack([(a.argmax(-1) == b.argmax(-1)).float().mean() for a, b in pairs])
    return {
        "kl": round(curve.mean().item(), 5),
        "kl_beyond_budget": round(curve[budget:].mean().item(), 5),
        "kl_last_quarter": round(curve[-len(curve) // 4 :].mean().item(), 5),
        "same_top1": round(same.mean().item(), 4),
        "seconds": round(seconds, 1),
    }


@torch.no_grad()
def measure_policy(folder: str, texts: Tensor, full: list[Tensor], eviction: Eviction) -> dict[str, Any]:
    """The same for a policy that looks at weights after earlier evictions, in the cache that evicts."""
    model = heedful.patch(AutoModelForCausalLM.from_pretrained(folder).eval(), score="softmax")
    started, got = time.perf_counter(), []
    for ids in texts:
        cache: Any = {CACHE: model.new_cache(eviction)}
        got.append(model(ids[None], **cache).logits[0].float().log_softmax(-1))
    assert isinstance(eviction.budget, int)
    return figures(full, got, eviction.budget, time.perf_counter() - started)


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("measured.jsonl"))
    values = parser.parse_args()
    model = Simulated(values.model)
    texts = texts_of(model.tokenizer, values.text, values.context, values.texts)
    full = [model.run(ids) for ids in texts]
    rankings: dict[str, tuple[Ranking, dict[str, int]]] = {"recency": (recency, {"first": 4})}
    for apart in (False, True):
        for reduce in ("sum", "max"):
            rankings[f"oracle, {reduce}, {'per KV head' if apart else 'per layer'}"] = (
                oracle(reduce, apart),
                {"grace": 16},
            )
    for budget in values.budgets:
        for name, (ranking, safe) in rankings.items():
            row = {
                "ranking": name,
                "context": values.context,
                "texts": values.texts,
                "budget": budget,
                **safe,
            }
            row |= measure(model, texts, full, ranking, Rule(budget, **safe))
            print(row, flush=True)
            with values.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        for policy, safe in (("h2o", {}), ("tova", {"first": 4, "grace": budget // 4})):
            row = {
                "ranking": policy,
                "context": values.context,
                "texts": values.texts,
                "budget": budget,
                **safe,
            }
            row |= measure_policy(values.model, texts, full, Eviction(budget, policy, **safe))
            print(row, flush=True)
            with values.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

"""Stage 0, forward only: selection heads learn, layer by layer, whom the future pays no attention to.

    python studies/conversion/local.py record MODEL DATA --texts 48 --context 1024 a.txt b.txt ...
    python studies/conversion/local.py train DATA OUT --layers 0 15      # two processes may share the layers
    python studies/conversion/local.py choose DATA                       # widths, rotation, who shares, age
    python studies/conversion/local.py measure MODEL OUT TEXT --budgets 128 256

The target of query i is the attention that later queries, i included, pay to each key, summed over the heads that
share a selector, as a distribution over the keys that may go by then. The prediction is softmax(-F): the loss is
their KL. Votes are relu(q.k) / 64, so that F, a sum over up to a thousand queries, and its gradient have a sound
size; they start small and equal, which makes F grow with age: recency. (Started 7 times larger, half of the layers
ended with no vote at all; with a gradient below zero, votes of a third of the layers grew without bound.)
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from simulate import Ranking, Rule, Seen, Simulated, measure, texts_of
from torch import Tensor, nn

from heedful.ops.rope import rotate, rotation

SHARE = 1 / 64
EVERY = 16  # one query in so many is a target


def record(model: Simulated, texts: Tensor, out: Path) -> None:
    """Keep what each layer sees: inputs (N, T, C) and for some queries the attention to come (N, G, n, T), bf16."""
    context, layers = texts.shape[1], len(model.model.model.layers)
    queries = torch.arange(3 * EVERY, context - 2 * EVERY, EVERY)
    inputs: list[list[Tensor]] = [[] for _ in range(layers)]
    targets: list[list[Tensor]] = [[] for _ in range(layers)]

    def see(seen: Seen) -> None:
        paid = seen.weights.unflatten(0, (seen.groups, -1)).sum(1)
        to_come = paid.flip(1).cumsum(1).flip(1)[:, queries]
        inputs[seen.layer].append(seen.x.bfloat16())
        targets[seen.layer].append(to_come.bfloat16())

    for i, ids in enumerate(texts):
        started = time.perf_counter()
        model.run(ids, see)
        print(f"text {i + 1} of {len(texts)}, {time.perf_counter() - started:.1f} s", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    for layer in range(layers):
        kept = {"x": torch.stack(inputs[layer]), "to_come": torch.stack(targets[layer]), "queries": queries}
        torch.save(kept, out / f"layer{layer}.pt")


class Selector(nn.Module):
    """F of every query, (R, T, T), from a layer's input (T, C)."""

    def __init__(self, width: int, selectors: int, size: int, scale: float, rotary: bool = False) -> None:
        super().__init__()
        self.shape, self.scale, self.rotary = (selectors, size), scale, rotary
        self.q, self.k = nn.Linear(width, selectors * size), nn.Linear(width, selectors * size)
        for layer, bias in ((self.q, 0.1), (self.k, 2.0 * size**0.5)):
            nn.init.normal_(layer.weight, std=(0.2 / width) ** 0.5)
            nn.init.zeros_(layer.bias)
            with torch.no_grad():
                layer.bias.view(self.shape)[:, 0] = bias

    def forward(self, x: Tensor) -> Tensor:
        q, k = (
            layer(x / self.scale).unflatten(-1, self.shape).transpose(-3, -2) for layer in (self.q, self.k)
        )
        if self.rotary:
            turns = rotation(torch.arange(x.shape[-2]), self.shape[1], torch.float32)
            q, k = rotate(q, *turns), rotate(k, *turns)
        votes = (q @ k.mT * self.shape[1] ** -0.5 * SHARE).relu().tril(-1)
        votes = votes * (torch.arange(votes.shape[-1]) > 0)
        return votes.cumsum(-2) - votes


class Retention(nn.Module):
    """The control: each token's own number for how much it will matter, and one for how fast that fades with age.

    As the retention gates of TRIM-KV (arXiv 2512.03324): who is asked is the token alone, no later query.
    """

    def __init__(self, width: int, selectors: int, size: int, scale: float) -> None:
        super().__init__()
        self.shape, self.scale = (selectors, size), scale
        self.hidden, self.out = nn.Linear(width, 2 * size), nn.Linear(2 * size, 2 * selectors)
        nn.init.zeros_(self.out.weight)
        with torch.no_grad():
            self.out.bias.view(2, selectors)[1] = -6.0  # a slope of 0.0025 a token

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x / self.scale)
        hidden = hidden if isinstance(self.hidden, nn.Identity) else nn.functional.silu(hidden)
        levels, slopes = self.out(hidden).mT.chunk(2, dim=-2)
        at = torch.arange(x.shape[-2])
        age = (at[:, None] - at).clamp(min=0)
        return nn.functional.softplus(slopes)[..., None, :] * age - levels[..., None, :]


class OwnVote(Selector):
    """Votes, and one that each token casts on itself as it arrives."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = (
            layer(x / self.scale).unflatten(-1, self.shape).transpose(-3, -2) for layer in (self.q, self.k)
        )
        return super().forward(x) + ((q * k).sum(-1) * self.shape[1] ** -0.5).relu()[..., None, :]


class Level(Selector):
    """Votes, and a linear function of the token that they begin with."""

    def __init__(self, width: int, selectors: int, size: int, scale: float, rotary: bool = False) -> None:
        super().__init__(width, selectors, size, scale, rotary)
        self.level = nn.Linear(width, selectors)
        nn.init.zeros_(self.level.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - self.level(x / self.scale).mT[..., None, :]


class LinearRetention(Retention):
    """Without a hidden layer."""

    def __init__(self, width: int, selectors: int, size: int, scale: float) -> None:
        super().__init__(width, selectors, size, scale)
        self.hidden, self.out = nn.Identity(), nn.Linear(width, 2 * selectors)
        nn.init.zeros_(self.out.weight)
        with torch.no_grad():
            self.out.bias.view(2, selectors)[1] = -6.0


HELD_OUT = 8  # texts, the last
FORMS = {
    "width 16": (1, 16, Selector),
    "width 32": (1, 32, Selector),
    "width 64": (1, 64, Selector),
    "width 32, rotary": (1, 32, partial(Selector, rotary=True)),
    "width 32, own vote": (1, 32, OwnVote),
    "width 32, level": (1, 32, Level),
    "width 32, rotary, level": (1, 32, partial(Level, rotary=True)),
    "linear retention": (1, 32, LinearRetention),
    "width 32, per KV head": (0, 32, Selector),
    "retention": (1, 32, Retention),
    "retention, per KV head": (0, 32, Retention),
}


def choose(data: Path, layers: list[int], steps: int, rate: float, grace: int, results: Path) -> None:
    """Learn each form on all but the last texts; what of the attention to come its survivors would get there."""
    for layer in layers:
        kept = torch.load(data / f"layer{layer}.pt", weights_only=True)
        x, to_come, queries = (
            kept["x"][-HELD_OUT:].float(),
            kept["to_come"][-HELD_OUT:].float(),
            kept["queries"],
        )
        keys = torch.arange(x.shape[1])
        may_go = (keys <= queries[:, None] - grace) & (keys >= 1)
        mass = to_come.masked_fill(~may_go, 0.0)
        stay = torch.div(may_go.sum(-1), 4, rounding_mode="floor")  # one in four stays

        def lost(ranks: Tensor, mass: Tensor = mass, may_go: Tensor = may_go, stay: Tensor = stay) -> float:
            """Share of the attention that keys that may go would get, and those that stay do not; (N, R, n, T)."""
            order = ranks.masked_fill(~may_go, torch.inf).argsort(-1)
            places = torch.empty_like(order).scatter_(
                -1, order, torch.arange(ranks.shape[-1]).expand_as(order)
            )
            gone = (places >= stay[:, None]) & may_go
            gone = gone.repeat_interleave(mass.shape[1] // gone.shape[1], 1)
            return ((mass * gone).sum((1, 3)) / mass.sum((1, 3))).mean().item()

        rows: list[dict[str, object]] = [
            {"form": "recency", "lost": lost(-keys.float().expand(len(x), 1, len(queries), -1))},
            {"form": "oracle, per layer", "lost": lost(-mass.sum(1, keepdim=True))},
            {"form": "oracle, per KV head", "lost": lost(-mass)},
        ]
        for name, (selectors, size, form) in FORMS.items():
            started = time.perf_counter()
            own, _ = learn(data, layer, selectors or mass.shape[1], size, steps, rate, grace, form, HELD_OUT)
            with torch.no_grad():
                ranks = torch.stack([own(text)[:, queries] for text in x])
            rows.append({"form": name, "lost": lost(ranks), "seconds": round(time.perf_counter() - started)})
        for row in rows:
            row = {"layer": layer, **row, "steps": steps}
            print(row, flush=True)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")


def learn(
    data: Path,
    layer: int,
    selectors: int,
    size: int,
    steps: int,
    rate: float,
    grace: int,
    form: Callable[..., Any] = Selector,
    held_out: int = 0,
) -> tuple[Any, list[float]]:
    """One layer's selector, and its losses."""
    kept = torch.load(data / f"layer{layer}.pt", weights_only=True)
    n_texts = len(kept["x"]) - held_out
    x, to_come, queries = kept["x"][:n_texts], kept["to_come"][:n_texts], kept["queries"]
    keys = torch.arange(x.shape[1])
    may_go = (keys <= queries[:, None] - grace) & (keys >= 1)
    torch.manual_seed(layer)
    own = form(x.shape[-1], selectors, size, float(x[:4].float().square().mean().sqrt()))
    optimizer, losses = torch.optim.Adam(own.parameters(), lr=rate), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = torch.randint(len(x), (2,))
        target = to_come[rows].float().unflatten(1, (selectors, -1)).sum(2).masked_fill(~may_go, 0.0)
        target = target / target.sum(-1, keepdim=True)
        predicted = (-own(x[rows].float())[:, :, queries]).masked_fill(~may_go, -1e9).log_softmax(-1)
        loss = nn.functional.kl_div(predicted, target, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return own, losses


def read(path: Path) -> Selector:
    """A selector that `train` left."""
    kept = torch.load(path, weights_only=True)
    own = Selector(kept["weights"]["q.weight"].shape[1], *kept["shape"], kept["scale"])
    own.load_state_dict(kept["weights"])
    return own


def ranked_by(selectors: dict[int, Selector]) -> Ranking:
    """Who has most votes goes."""

    @torch.no_grad()
    def rank(seen: Seen) -> Tensor:
        return selectors[seen.layer](seen.x)

    return rank


def main() -> None:
    """Record, train or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("record")
    one.add_argument("model")
    one.add_argument("data", type=Path)
    one.add_argument("files", nargs="+")
    one.add_argument("--texts", type=int, default=48)
    two = parts.add_parser("train")
    two.add_argument("data", type=Path)
    two.add_argument("out", type=Path)
    two.add_argument("--layers", type=int, nargs=2, default=[0, 30])
    two.add_argument("--selectors", type=int, default=1)
    two.add_argument("--size", type=int, default=32)
    two.add_argument("--steps", type=int, default=200)
    two.add_argument("--rate", type=float, default=2e-3)
    three = parts.add_parser("measure")
    three.add_argument("model")
    three.add_argument("out", type=Path)
    three.add_argument("text")
    three.add_argument("--texts", type=int, default=2)
    three.add_argument("--results", type=Path, default=Path(__file__).with_name("measured.jsonl"))
    three.add_argument("--budgets", type=int, nargs="+", default=[128, 256])
    four = parts.add_parser("choose")
    four.add_argument("data", type=Path)
    four.add_argument("--layers", type=int, nargs="+", default=[0, 4, 8, 12, 16, 20, 24, 28])
    four.add_argument("--steps", type=int, default=200)
    four.add_argument("--rate", type=float, default=2e-3)
    four.add_argument("--results", type=Path, default=Path(__file__).with_name("forms.jsonl"))
    for part in (one, three):
        part.add_argument("--context", type=int, default=1024)
    for part in (two, three, four):
        part.add_argument("--grace", type=int, default=16)
    values = parser.parse_args()
    if values.part == "record":
        model, draw, rows = Simulated(values.model), random.Random(0), []
        books = [Path(name).read_text(encoding="utf-8", errors="replace") for name in values.files]
        while len(rows) < values.texts:
            book = books[len(rows) % len(books)]
            at = book.find("\n", draw.randrange(max(1, len(book) - 8 * values.context))) + 1
            ids = model.tokenizer(book[at : at + 8 * values.context])["input_ids"][: values.context]
            rows += [ids] if len(ids) == values.context else []
        record(model, torch.tensor(rows), values.data)
    elif values.part == "train":
        torch.set_num_threads(1)
        values.out.mkdir(parents=True, exist_ok=True)
        for layer in range(*values.layers):
            how = values.selectors, values.size, values.steps, values.rate, values.grace
            started = time.perf_counter()
            own, losses = learn(values.data, layer, *how)
            n = max(1, len(losses) // 10)
            first, last, seconds = sum(losses[:n]) / n, sum(losses[-n:]) / n, time.perf_counter() - started
            print(f"layer {layer}: KL {first:.3f} -> {last:.3f}, {seconds:.0f} s", flush=True)
            kept = {"shape": own.shape, "scale": own.scale, "weights": own.state_dict()}
            torch.save(kept, values.out / f"selector{layer}.pt")
    elif values.part == "choose":
        torch.set_num_threads(1)
        how = values.steps, values.rate, values.grace
        choose(values.data, values.layers, *how, values.results)
    else:
        model = Simulated(values.model)
        paths = sorted(values.out.glob("selector*.pt"))
        selectors = {int(path.stem.removeprefix("selector")): read(path) for path in paths}
        texts = texts_of(model.tokenizer, values.text, values.context, values.texts)
        full = [model.run(ids) for ids in texts]
        for budget in values.budgets:
            rule = Rule(budget, grace=values.grace, first=4)
            row = {"ranking": f"votes, {values.out.name}", "context": values.context, "texts": values.texts}
            row |= {"budget": budget, "first": 4, "grace": values.grace}
            row |= measure(model, texts, full, ranked_by(selectors), rule)
            print(row, flush=True)
            with values.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

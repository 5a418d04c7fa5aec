"""heedful's evictions that need no training against kvpress's presses: run by `make check-kvpress`, a minute.

    python benchmarks/kvpress_check/compare.py FOLDER [--out results/kvpress]

FOLDER is what `presses.py` wrote. Its models are converted, and read its prompts under an eviction that waits
for the token after the prompt (`evict_every` = the length of the prompt), as kvpress compresses a prompt once. One
more token is held, the one that has just arrived. With two key heads SnapKV, KeyDiff and H2O decide for each
(`per="kv_head"`), as kvpress does. Then both decode token by token, one token going with each that comes. Fails
unless scores are the same to 1e-6 of the largest, logits to 1e-8, and all survivors the same.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import heedful
from heedful.attention.eviction import EvictingCache, Eviction
from heedful.files import write_text
from heedful.hf.names import CACHE
from heedful.screen import Column, table, text

GRACE = {"tova": 2, "snapkv": 1, "h2o": 1, "keydiff": 1, "streaming": 1}
"""With the token that has just arrived; TOVA's press keeps the query it asks, too."""
APART = "snapkv", "keydiff", "h2o"
QUERY_HEADS = 4
SAME_SCORES, SAME_LOGITS = 1e-6, 1e-8


@dataclass(frozen=True)
class Row:
    """One policy in one setting."""

    policy: str
    how: str
    sets: int
    """Sets of survivors that were compared: layers by rows by heads, by tokens where one goes with each."""
    same_sets: int
    held: int
    """Tokens in a set."""
    others: int | None = None
    """Tokens in a set, at most, that the press would not have kept had it not been told which are safe."""
    scores_off: float | None = None
    """The largest difference of a score, over the largest score."""
    logits_off: float | None = None

    @property
    def same(self) -> bool:
        off = (self.scores_off or 0.0) <= SAME_SCORES and (self.logits_off or 0.0) <= SAME_LOGITS
        return off and self.same_sets == self.sets


def main() -> None:
    disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="folder for kvpress.jsonl and kvpress.txt")
    arguments = parser.parse_args()
    theirs = load_file(arguments.folder / "presses.safetensors")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("one", "two"):
            for policy in GRACE:
                apart = name == "two" and policy in APART
                model = converted(arguments.folder / name, Path(scratch) / f"{name}-{apart}", apart)
                rows.append(once(model, policy, name, apart, theirs))
        model = converted(arguments.folder / "one", Path(scratch) / "one-False", False)
        rows += [step_by_step(model, policy, theirs) for policy in ("tova", "keydiff")]
    console = Console(highlight=False, width=120)
    with console.capture() as capture:
        console.print(as_table(rows))
    print(capture.get(), end="")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out / "kvpress.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in rows))
        write_text(arguments.out / "kvpress.txt", capture.get())
    if bad := [f"{row.policy}, {row.how}" for row in rows if not row.same]:
        raise SystemExit(f"not the same: {'; '.join(bad)}")


def converted(source: Path, out: Path, apart: bool) -> Any:
    how: dict[str, Any] = {"per": "kv_head"} if apart else {"score": "softmax"}
    if not out.exists():
        heedful.convert(source, out, **how)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()


@torch.no_grad()
def once(model: Any, policy: str, name: str, apart: bool, theirs: dict[str, Tensor]) -> Row:
    """A prompt, compressed when the next token comes."""
    ids, press, survivors, plain = (
        theirs[f"{name}/{key}"]
        for key in ("ids", f"{policy}/scores", f"{policy}/survivors", f"{policy}/as they are")
    )
    length, kept = ids.shape[1], survivors.shape[-1]
    cache = model.new_cache(Eviction(kept + 1, policy, evict_every=length, grace=GRACE[policy]))
    model(ids, **{CACHE: cache})
    off, largest = [], []
    for memory, expected in zip(cache.memories, press, strict=True):
        got, columns = scores_like_theirs(policy, memory, length, QUERY_HEADS // (2 if apart else 1))
        if got is not None:
            expected = expected.flatten(0, 1) if apart else expected[:, 0]
            off.append((got[:, columns] - expected[:, columns]).abs().max())
            largest.append(expected[:, columns].abs().max())
    model(ids[:, :1], **{CACHE: cache})
    same = most = 0
    for memory, expected, others in zip(
        cache.memories, survivors.flatten(1, 2), plain.flatten(1, 2), strict=True
    ):
        held = memory.positions.sort(-1).values[:, -kept - 1 : -1]  # the newest is the token after the prompt
        held = held if apart else held.repeat_interleave(len(expected) // len(held), 0)
        same += int((held == expected).all(-1).sum())
        common = (held[:, :, None] == others[:, None]).any(-1).sum(-1)
        most = max(most, kept - int(common.min()))
    how = f"{length} tokens to {kept}, once; " + ("one key head" if name == "one" else "two key heads")
    how += ", each for itself" if apart else ", together" if name == "two" else ""
    relative = (torch.stack(off).max() / torch.stack(largest).max()).item() if off else None
    return Row(policy, how, survivors[..., 0].numel(), same, kept, most, relative)


def scores_like_theirs(
    policy: str, memory: EvictingCache, length: int, heads: int
) -> tuple[Tensor | None, slice]:
    """(rows, T) as the press has them, high = stays, of a prompt that is held whole; and the columns that count."""
    order = memory.positions.sort(-1).indices[:, -length:]
    scores = memory.scores.double()
    if policy == "h2o":  # theirs: a mean over the queries that saw the token, and over heads
        return -scores.gather(-1, order) / (heads * torch.arange(length, 0, -1)), slice(0, length)
    if policy == "tova":  # theirs: the query itself has the best, whatever it is
        return -scores.gather(-1, order), slice(0, length - 1)
    if policy == "snapkv":  # theirs: a mean over the window and over heads; the window has the best
        window = memory.policy.window
        newest = torch.full_like(memory.positions[:, :1], length)
        wanted = memory.policy.priority(memory.scores, memory.positions, newest, memory.rule.budget or 0)
        return -wanted.double().gather(-1, order) / (window * heads), slice(0, length - window)
    if policy == "keydiff":
        alike = memory.policy.rate(memory.slots.held()["k"], memory.positions >= 0)
        return -alike.double().gather(-1, order), slice(0, length)
    return None, slice(0)  # streaming: theirs are ones and zeros


@torch.no_grad()
def step_by_step(model: Any, policy: str, theirs: dict[str, Tensor]) -> Row:
    """One token goes with each that comes."""
    held, logits = theirs[f"steps/{policy}/held"], theirs[f"steps/{policy}/logits"]
    steps, _, _, most = held.shape
    ids = theirs["one/ids"][:, : most - 1 + steps]
    cache = model.new_cache(Eviction(most, policy, grace=GRACE[policy]))
    model(ids[:, : most - 1], **{CACHE: cache})
    same, off = 0, []
    for t in range(steps):
        out = model(ids[:, most - 1 + t : most + t], **{CACHE: cache}).logits[:, 0]
        off.append((out - logits[:, t]).abs().max())
        for memory, expected in zip(cache.memories, held[t], strict=True):
            same += int((memory.positions.sort(-1).values == expected).all(-1).sum())
    how = f"{steps} tokens, {most} held, one by one; one key head"
    return Row(policy, how, held[..., 0].numel(), same, most, logits_off=torch.stack(off).max().item())


def as_table(rows: list[Row]) -> Any:
    columns = [text("policy"), text("what both did")]
    columns += map(Column, ("survivors", "others if not told", "scores off by", "logits off by"))

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    cells = []
    for r in rows:
        others = "" if r.others is None else f"{r.others} of {r.held}"
        numbers = [f"{r.same_sets} of {r.sets}", others, shown(r.scores_off), shown(r.logits_off)]
        cells.append([r.policy, r.how, *numbers])
    return table(columns, cells, width=120)


if __name__ == "__main__":
    main()

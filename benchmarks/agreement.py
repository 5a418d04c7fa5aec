"""Forms beside their authors' own code, which is read from where you have it: a few seconds.

    python benchmarks/agreement.py --tpa TPA/model/T6.py --fox fla/ops/forgetting_attn/naive.py

Writes results/agreement, or --out. Their repositories are github.com/tensorgi/TPA and
github.com/fla-org/flash-linear-attention; the second file needs einops. Both files are run, so name files that you
trust. Weights and inputs are drawn here and given to both; all in float64, outputs and gradients.
"""

import argparse
import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from heedful.attention import TensorProductAttention, build
from heedful.files import write_text

TPA_SIZES = [
    {"d_model": 12, "n_heads": 3, "head_dim": 4, "q_rank": 6, "rank": 2, "length": 6},
    {"d_model": 48, "n_heads": 4, "head_dim": 16, "q_rank": 2, "rank": 3, "length": 33},
    {"d_model": 64, "n_heads": 2, "head_dim": 32, "q_rank": 12, "rank": 1, "length": 65},
]
FOX_SIZES = [
    {"d_model": 16, "n_heads": 4, "n_kv_heads": 4, "length": 13},
    {"d_model": 48, "n_heads": 6, "n_kv_heads": 2, "length": 65},
    {"d_model": 64, "n_heads": 4, "n_kv_heads": 1, "length": 200},
]
FORMS = {"tpa": "tpa", "fox": "forgetting"}
MOST_APART = 1e-13
PAGE = """# Do the forms compute what their authors' code computes?

Command: `python benchmarks/agreement.py --tpa TPA/model/T6.py --fox fla/ops/forgetting_attn/naive.py`, a few
seconds; [agreement.jsonl](agreement.jsonl) has a row per comparison. `tpa` is run beside the layer of
github.com/tensorgi/TPA, with its weights copied; `forgetting` beside the naive formula of
github.com/fla-org/flash-linear-attention, on the same queries, keys, values and gates. Random weights and
inputs, two rows, float64; apart: the largest difference over the largest value, of the outputs and of the
gradients of the inputs.

| form | their file (sha256) | size | outputs apart | gradients apart |
|---|---|---|---|---|
{rows}

Two things of theirs are changed for this: TPA rounds the tables of its rotation to bfloat16, which alone makes
outputs differ by 2e-3 to 2e-2, and they are float64 here; flash-linear-attention computes in float32, and
`.float()` is `.double()` here. TPA rotates the other way round, so that the halves of each factor change
places.

`mla` is compared with transformers' DeepSeek-V3 attention by a test (`tests/attention/test_mla.py`), whole rows
and token by token from the latents, to 1e-11. `talking_heads`, `sigmoid` and `sas_linear` are compared with
float64 loops in the tests that have their names.
"""


def main() -> None:
    """Compare what is named, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tpa", type=Path, help="model/T6.py of tensorgi/TPA")
    parser.add_argument(
        "--fox", type=Path, help="fla/ops/forgetting_attn/naive.py of fla-org/flash-linear-attention"
    )
    parser.add_argument("--out", type=Path, default=Path("results/agreement"))
    named = parser.parse_args()
    if named.tpa is None and named.fox is None:
        parser.error("name --tpa or --fox, or both")
    rows: list[dict[str, Any]] = []
    for form, path, sizes, run in (("tpa", named.tpa, TPA_SIZES, tpa), ("fox", named.fox, FOX_SIZES, fox)):
        if path is not None:
            theirs, digest = _load(path), hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            rows += [
                {"form": form, "file": path.name, "sha256": digest, **s, **run(theirs, s)} for s in sizes
            ]
    for row in rows:
        print(row)
    named.out.mkdir(parents=True, exist_ok=True)
    write_text(named.out / "agreement.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(named.out / "README.md", PAGE.format(rows="\n".join(map(_line, rows))))
    if any(row[what] > MOST_APART for row in rows for what in ("output", "gradient")):
        raise SystemExit(f"apart by more than {MOST_APART:g} of the largest value")


def _line(row: dict[str, Any]) -> str:
    known = ("form", "file", "sha256", "output", "gradient")
    size = ", ".join(f"{name} {value}" for name, value in row.items() if name not in known)
    where = f"`{row['file']}` ({row['sha256']})"
    return f"| `{FORMS[row['form']]}` | {where} | {size} | {row['output']:.0e} | {row['gradient']:.0e} |"


def tpa(theirs: ModuleType, size: dict[str, int]) -> dict[str, float]:
    """Their layer, ours with its weights."""
    torch.manual_seed(0)
    heads, features, rank, q_rank = size["n_heads"], size["head_dim"], size["rank"], size["q_rank"]
    layer = theirs.CausalSelfAttention(
        SimpleNamespace(n_head=heads, head_dim=features, n_embd=size["d_model"], rank=rank, q_rank=q_rank)
    )
    layer = layer.double()
    nn.init.normal_(layer.c_proj.weight, std=0.5)  # theirs begins at zero
    layer.c_qkv.rotary.forward = _exact_tables(features)
    ours = build(
        "tpa",
        d_model=size["d_model"],
        n_heads=heads,
        head_dim=features,
        q_rank=q_rank,
        k_rank=rank,
        v_rank=rank,
    ).double()
    assert isinstance(ours, TensorProductAttention)
    # They turn features the other way: the halves of each factor change places.
    turned = torch.cat((torch.arange(features // 2, features), torch.arange(features // 2)))
    weights = {"o_proj.weight": layer.c_proj.weight}
    for name, n in (("q", q_rank), ("k", rank), ("v", rank)):
        by_head = getattr(layer.c_qkv, f"W_A_{name}").weight.unflatten(0, (heads, n))
        by_rank = getattr(layer.c_qkv, f"W_B_{name}").weight.unflatten(0, (n, features))
        weights[f"{name}_heads.weight"] = by_head.transpose(0, 1).flatten(0, 1)
        weights[f"{name}_features.weight"] = (by_rank if name == "v" else by_rank[:, turned]).flatten(0, 1)
    ours.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
    x = torch.randn(2, size["length"], size["d_model"], dtype=torch.float64)
    return _apart(_run(layer, x), _run(ours, x))


def fox(theirs: ModuleType, size: dict[str, int]) -> dict[str, float]:
    """Our layer, and its queries, keys, values and gates through their formula."""
    torch.manual_seed(0)
    own = {name: size[name] for name in ("d_model", "n_heads", "n_kv_heads")}
    ours = build("gqa", "forgetting", init_logit_std=2.0, **own).double()
    nn.init.uniform_(ours.score.gate_proj.bias, -1, 3)

    def formula(x: Tensor) -> Tensor:
        q, memory = ours.project(x, torch.arange(x.shape[1])[None])
        k, v = ours.keys_values(memory)
        gates = nn.functional.logsigmoid(ours.score.gate_proj(x))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with _float_is_double():
            out = theirs.naive_forgetting_attn(q, k, v, gates, scale=ours.scale)
        return ours.aggregate(out.transpose(1, 2))

    x = torch.randn(2, size["length"], size["d_model"], dtype=torch.float64)
    return _apart(_run(formula, x), _run(ours, x))


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"theirs_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _exact_tables(features: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Cosines and sines in float64, where theirs are rounded to bfloat16."""

    def tables(x: Tensor) -> tuple[Tensor, Tensor]:
        rates = 10000.0 ** (-torch.arange(0, features, 2).double() / features)
        angles = torch.outer(torch.arange(x.shape[1]).double(), rates)[None, :, None]
        return angles.cos(), angles.sin()

    return tables


@contextmanager
def _float_is_double() -> Iterator[None]:
    """Their formula computes in `.float()`."""
    before = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.float = before  # type: ignore[method-assign]


def _run(layer: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    given = x.clone().requires_grad_()
    out = layer(given)
    return out.detach(), torch.autograd.grad(out.square().sum(), given)[0]


def _apart(theirs: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The largest difference over the largest value."""
    found = {
        name: ((a - b).abs().max() / a.abs().max()).item()
        for name, a, b in zip(("output", "gradient"), theirs, ours, strict=True)
    }
    assert all(map(math.isfinite, found.values()))
    return found


if __name__ == "__main__":
    main()

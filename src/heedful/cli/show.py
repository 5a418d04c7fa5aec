"""`heedful show`."""

import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from heedful.attention import configure
from heedful.attention.config import own_fields
from heedful.attention.registry import ATTENTIONS, SCORES, Form
from heedful.cli.errors import UsageError
from heedful.cli.parsing import parse, positional
from heedful.ops.checks import did_you_mean
from heedful.screen import Column, table, text

DESCRIPTION = """Explain one form: what it is, its formula, its options, what it costs, where it is from."""

WIDTH, HEADS, CONTEXT = 768, 12, 2048


def run(arguments: Sequence[str]) -> int:
    """Print everything about one form."""
    name = parse(
        "show",
        DESCRIPTION,
        [positional("name", str, dataclasses.MISSING, "a form from heedful ls")],
        arguments,
    )["name"]
    if name in ATTENTIONS:
        show(ATTENTIONS[name], "attention")
    elif name in SCORES:
        show(SCORES[name], "score")
    else:
        known = [*ATTENTIONS, *SCORES]
        hint = did_you_mean(name, known)
        raise UsageError(f"unknown form {name!r}; {hint}forms: {', '.join(known)}")
    return 0


def show(form: Form, kind: str) -> None:
    """Print one form."""
    console = Console(highlight=False)
    console.print(f"[bold cyan]{form.name}[/] ({kind})\n")
    for doc in (form.config_class.__doc__, form.module_class.__doc__):
        if doc:
            console.print(escape(_unwrapped(doc)) + "\n")
    if formula := form.module_class.formula:
        console.print("[bold]formula[/bold]")
        console.print(escape(_indented(inspect.cleandoc(formula), console.width)) + "\n", style="green")
    options = own_fields(form.config_class)
    if options:
        rows = [
            (f"--{kind}.{f.name.replace('_', '-')}", str(f.default), escape(f.metadata.get("help", "")))
            for f in options
        ]
        console.print(
            table(
                [text("flag"), text("default"), text("meaning")], rows, title="options", width=console.width
            )
        )
    _costs(console, form.name, kind)


def _unwrapped(doc: str) -> str:
    """A docstring with one line per paragraph, for a terminal of any width."""
    paragraphs = inspect.cleandoc(doc).split("\n\n")
    return "\n\n".join(" ".join(p.split()) for p in paragraphs)


def _indented(formula: str, width: int) -> str:
    """Lines that are too long go on below, further in."""
    lines = []
    for line in formula.splitlines():
        further = " " * (len(line) - len(line.lstrip()) + 4)
        lines += textwrap.wrap(line, width, subsequent_indent=further, break_on_hyphens=False) or [""]
    return "\n".join(lines)


def _costs(console: Console, name: str, kind: str) -> None:
    """Parameters, FLOPs and cache beside plain attention of the same width."""
    base = configure("mha", d_model=WIDTH, n_heads=HEADS)
    extra: dict[str, Any] = {"n_kv_heads": HEADS // 3} if name == "gqa" else {}
    pair = (name, "softmax") if kind == "attention" else ("mha", name)
    own = configure(*pair, d_model=WIDTH, n_heads=HEADS, **extra)
    rows = []
    for label, config in {"mha x softmax": base, " x ".join(pair): own}.items():
        params, flops = config.parameter_count(), config.flops_per_token(CONTEXT)
        cache = config.cache_bytes_per_token(2)
        cells = (
            label,
            f"{params:,} ({params / base.parameter_count():.2f}x)",
            f"{flops / 1e6:.2f} M ({flops / base.flops_per_token(CONTEXT):.2f}x)",
            f"{cache:,} ({cache / base.cache_bytes_per_token(2):.2f}x)",
        )
        rows.append(cells)
    heads = ("parameters", "FLOPs/token", "cache bytes/token (bf16)")
    columns = [text("form"), *(Column(head, breaks=True) for head in heads)]
    title = f"one layer, width {WIDTH}, {HEADS} heads, context {CONTEXT:,}"
    console.print(table(columns, rows, title=title, width=console.width))

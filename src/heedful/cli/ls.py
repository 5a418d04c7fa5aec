"""`heedful ls`."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from heedful.attention import available
from heedful.attention.config import own_fields
from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.cli.parsing import parse
from heedful.screen import table, text

DESCRIPTION = """List the forms. An attention makes q, k, v and the output; a score says what happens to
the logits. Any attention goes with any score. More on one: heedful show NAME"""


def run(arguments: Sequence[str]) -> int:
    """Print a table of both registries."""
    parse("ls", DESCRIPTION, [], arguments)
    available()
    console = Console(highlight=False)
    for registry in (ATTENTIONS, SCORES):
        rows = []
        for name in registry:
            form = registry[name]
            options = ", ".join(f.name.replace("_", "-") for f in own_fields(form.config_class))
            rows.append((f"[bold]{name}[/]", escape(form.summary), escape(options)))
        prefix = f"--{registry.kind}." if any(row[2] for row in rows) else ""
        columns = [text("name"), text("what it is"), text(f"options {prefix}".strip())]
        console.print(table(columns, rows, title=registry.kind, width=console.width))
    console.print("More on one: heedful show NAME. gqa also needs --n-kv-heads.", style="dim")
    return 0

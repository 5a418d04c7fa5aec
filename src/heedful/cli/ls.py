"""`heedful ls`."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from heedful.attention import available
from heedful.attention.config import own_fields
from heedful.attention.registry import ATTENTIONS, SCORES
from heedful.cli.parsing import parse

DESCRIPTION = """List the forms. An attention makes q, k, v and the output; a score says what happens to
the logits. Any attention goes with any score. More on one: heedful show NAME"""


def run(arguments: Sequence[str]) -> int:
    """Print a table of both registries."""
    parse("ls", DESCRIPTION, [], arguments)
    available()
    console = Console()
    for registry in (ATTENTIONS, SCORES):
        table = Table(title=registry.kind, title_justify="left", title_style="bold", header_style="bold cyan")
        for column in ("name", "what it is", "options"):
            table.add_column(column)
        for name in registry:
            form = registry[name]
            options = ", ".join(f.name.replace("_", "-") for f in own_fields(form.config_class))
            table.add_row(name, form.summary, options)
        console.print(table)
    return 0

"""`heedful demo`."""

from collections.abc import Sequence

from rich.console import Console

from heedful.cli.parsing import flag, parse
from heedful.errors import Interrupted
from heedful.screen import spinner

DESCRIPTION = """The whole story on two cores, offline: four small language models on
Jane Austen (standard and SAS, with softmax and Selective Attention), a task of memory that Selective
Attention learns much sooner than standard attention, and text from a small cache."""


def run(arguments: Sequence[str]) -> int:
    """Run the demo."""
    values = parse("demo", DESCRIPTION, [flag("out", str, "runs/demo", "folder for everything")], arguments)
    with spinner(Console(), "loading transformers"):
        from heedful.demo import demo

    try:
        demo(values["out"])
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; the same command goes on") from None
    return 0

"""`heedful doctor`: it works without the extras, since it says which are missing."""

import json
import shutil
import textwrap
from collections.abc import Sequence

from heedful.cli.errors import UsageError
from heedful.cli.wrapping import wrapped
from heedful.doctor import examine, lines
from heedful.ops.checks import did_you_mean

DESCRIPTION = """usage: heedful doctor [--json]

Say what is active on this machine, and why: versions, extras that are missing, the processor and its
threads, the GPU, and which implementation impl="auto" takes.

  --json    the same as JSON"""


def run(arguments: Sequence[str]) -> int:
    """Print the report."""
    if any(word in ("-h", "--help") for word in arguments):
        print(wrapped(DESCRIPTION))
        return 0
    for word in arguments:
        if word != "--json":
            hint = did_you_mean(word, ["--json"])
            raise UsageError(f"unknown option {word}; {hint}see heedful doctor --help")
    report = examine()
    if arguments:
        print(json.dumps(report, indent=2))
        return 0
    width = max(40, shutil.get_terminal_size().columns)
    for line in lines(report):
        print(
            textwrap.fill(
                line, width, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
            )
        )
    return 0

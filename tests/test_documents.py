"""What the README and the examples promise, run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_links_of_the_documents_exist():
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.slow
def test_example_form_keeps_the_contract():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); import shared_kv\n"
    code += "from heedful.testing import check_form; check_form('shared_kv', 'selective')"
    run_python(code)


def test_example_form_is_listed():
    code = "import sys; from heedful.cli import main; sys.exit(main(['ls']))"
    assert "shared_kv" in run_python(code, HEEDFUL_FORMS=str(ROOT / "examples" / "shared_kv.py"))

"""The rules of the architecture that code can check."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import heedful
from heedful.attention.registry import ATTENTIONS, SCORES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "heedful"
EXTRAS = [
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "safetensors",
    "tyro",
    "rich",
    "matplotlib",
    "tensorboard",
    "triton",
]
FORMS = [(kind, name) for kind, names in heedful.available().items() for name in names]


def run_python(code: str, *args: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def torch_only_modules() -> list[str]:
    """Name every module that promises to need torch and nothing else: all but the kernels of Triton."""
    modules = []
    for layer in ("ops", "attention", "decoder", "testing"):
        files = list((PACKAGE / layer).rglob("*.py")) or [PACKAGE / f"{layer}.py"]
        for file in files:
            parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
            if parts[-2] != "kernels":
                modules.append(".".join(part for part in parts if part != "__init__"))
    return sorted(modules)


def test_layers_are_kept():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_is_light():
    code = """
import gc, json, sys, time
import torch
gc.freeze()  # going through all that torch holds takes 0.1 s, and may or may not fall in here
before = time.process_time()
import heedful
heedful.available()
print(json.dumps([time.process_time() - before, list(sys.modules)]))
"""
    for _ in range(3):  # the least disturbed of three
        seconds, modules = json.loads(run_python(code))
        loaded = set(EXTRAS) & set(modules)
        assert not loaded, f"`import heedful` loads {sorted(loaded)}"
        if seconds < 0.3:
            break
    assert seconds < 0.3, f"heedful takes {seconds:.2f} s to import on top of torch"


def test_torch_only_modules_import_without_extras():
    code = """
import importlib, sys

sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # None: neither found nor imported
for module in sys.argv[2].split(","):
    importlib.import_module(module)
"""
    run_python(code, ",".join([*EXTRAS, "numpy"]), ",".join(torch_only_modules()))


@pytest.mark.parametrize(("kind", "name"), FORMS, ids=[f"{kind}-{name}" for kind, name in FORMS])
def test_config_fields_are_documented(kind: str, name: str):
    registry = {"attention": ATTENTIONS, "score": SCORES}[kind]
    for field in dataclasses.fields(registry[name].config_class):
        text = field.metadata.get("help", "")
        assert text.strip(), f'{name}: write field(..., metadata={{"help": ...}}) for {field.name}'
        assert "\n" not in text, f"{name}: the help of {field.name} must be one line"


def test_no_machine_paths():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # New files count before they are added.
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    machine_path = re.compile(r"(?<![\w.~-])/(?:work|root|home|Users)/\S*")
    found = []
    for name in filter(None, listing.split("\0")):
        file = ROOT / name
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {match}" for match in machine_path.findall(text)]
    assert not found, "\n".join(found)


def test_the_version_is_in_one_place():
    """`heedful.__version__` is it: the build reads it, and what quotes it agrees."""
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    quoted = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert quoted is not None and quoted[1] == heedful.__version__
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None and newest[1] == heedful.__version__


def test_ci_runs_what_a_person_can_run():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: .ci/run\n" in workflow
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)$", script, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert {"check", "test", "test-slow", "dist-check", "test-matrix"} <= set(
        re.findall(r"make (\S+)", script)
    )

"""Every block of code in README.md and in docs/ is run, as it stands but for its size.

What is substituted, so that a block takes seconds: trainings become three steps of a tiny model on a small text
(`steps`, `--steps`, `TINY`), texts of a hundred tokens become eight, measurements take their smallest sizes
(`SMALLEST`), the prompts are as they are. `pip` and `make` are not run: what they name must exist.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.stock import save_stock_model

ROOT = Path(__file__).parents[1]
README, GUIDE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/your-checkpoint.md")
)


def commands_of(text: str) -> list[list[str]]:
    """The lines of its bash blocks, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = commands_of(README)
SHORTER = {"--baseline-steps": "1,4", "--seeds": "2", "--workers": "1"}
TINY = {
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "batch_size": 2,
    "context": 32,
    "vocab_size": 300,
    "steps": 3,
    "evaluations": 1,
    "checkpoints": 1,
}
QUICK = {
    "generate": ["--max-new-tokens", "8"],
    "adapt": ["--context", "160", "--local-tokens", "320"],
}
SMALLEST = {
    "kernels": "--lengths 32 --heads 2 --head-dim 8 --seconds 0.02 --turns 3 --no-memory",
    "train": "--lengths 32 --n-layers 1 --d-model 16 --n-heads 2 --vocab-size 64 --turns 3 --no-memory",
}


def run(arguments: list[str], where: Path) -> str:
    """Run Python in a folder and return what it printed."""
    environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=where, env=environment
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def place(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text that README calls my.txt."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my.txt").write_text(text_file.read_text(encoding="utf-8") * 4, encoding="utf-8")
    (folder / "other.txt").write_text(text_file.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    save_stock_model(folder / "SmolLM2-135M", [text_file.read_text(encoding="utf-8")])
    return folder


def test_python_modules(place: Path):
    code = PYTHON[0] + "\nprint(tuple(y.shape), tuple(out.shape), tuple(soft_mask.shape), cache.kept)"
    assert run(["-c", code], place).strip() == "(2, 1, 768) (2, 8, 128, 64) (2, 1, 128) 64"


@pytest.mark.slow
def test_python_language_model(place: Path):
    sizes = ", ".join(f"{name}={value}" for name, value in TINY.items())
    code = PYTHON[1].replace("steps=500", sizes).replace("max_new_tokens=100", "max_new_tokens=8")
    assert sizes in code
    assert "max_new_tokens=8" in code
    assert "Once upon a time" in run(["-c", code], place)


def test_there_are_no_other_blocks():
    assert len(PYTHON) == 2
    assert set(re.findall(r"```(\w+)", README)) == {"python", "bash"}
    assert {words[0] for words in COMMANDS if words} == {"pip", "make", "heedful"}


def test_make_and_pip_name_what_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for words in COMMANDS:
        if words[:1] == ["make"]:
            assert words[1] in targets
        if words[:1] == ["pip"]:
            for what in (word for word in words[2:] if not word.startswith(("-", "vllm"))):
                extra = re.match(r"^\.\[(\w+)\]$", what)
                known = extra[1] in project["optional-dependencies"] if extra else (ROOT / what).is_dir()
                assert known, what


@pytest.mark.slow
def test_every_command(place: Path):
    """In order, in one folder, so that later ones find what earlier ones left."""
    run_all(COMMANDS, place)


@pytest.mark.slow
def test_the_guide(place: Path):
    run_all(commands_of(GUIDE), place)
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    assert "The capital of France is" in run(["-c", code], place)


def run_all(commands: list[list[str]], place: Path) -> None:
    """Those of heedful."""
    for words in commands:
        if words[:1] != ["heedful"]:
            continue
        command = words[1:]
        if command[0] in ("serve", "study") or "--engine" in command:
            continue  # they need vLLM: plugins/vllm/tests; or hours: tests/study
        if command[0] in ("train", "compare"):
            if "--steps" in command:
                at = command.index("--steps")
                del command[at : at + 2]
            for name, value in SHORTER.items():
                if name in command:
                    command[command.index(name) + 1] = value
            for name, value in TINY.items():
                if name == "context" and any(word.startswith("synthetic:") for word in command):
                    continue  # a task has a length of its own
                command += [f"--{name.replace('_', '-')}", str(value)]
            if "--data" not in command:
                command += ["--data", "my.txt"]
        command += QUICK.get(command[0], [])
        if "--source" in command:
            command[command.index("--rows") + 1] = "1"
            command += ["--context", "160"]
        if "--tasks" in command:
            if find_spec("lm_eval") is None:  # an extra of its own
                continue
            command[command.index("--limit") + 1] = "2"
        if command[0] == "bench":
            command += shlex.split(SMALLEST[command[1]])
        code = "import sys; from heedful.cli import main; sys.exit(main(sys.argv[1:]))"
        run(["-c", code, *command], place)

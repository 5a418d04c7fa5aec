"""The harness's own command, and how it finds the model."""

import functools
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason='pip install "heedful[tasks]"')

from lm_eval import evaluator, tasks
from lm_eval.api.registry import Registry, get_model

from heedful.lm_eval import TASKS
from heedful.lm_eval.__main__ import main
from heedful.lm_eval.model import NAME, HeedfulLM

ROOT = Path(__file__).parents[2]


def test_the_command(
    voting: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # asks pip and git, for seconds
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # would stay after the test
    ours_alone = functools.partial(tasks.TaskManager, include_defaults=False)  # to read theirs takes long
    monkeypatch.setattr(tasks, "TaskManager", ours_alone)
    arguments = f"--model heedful --model_args pretrained={voting},kv_budget=8,kv_policy=streaming,kv_first=2"
    arguments += f" --tasks copy --limit 3 --batch_size 2 --output_path {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments.split(), "--metadata", '{"length": 100}'])
    main()
    out = capsys.readouterr().out
    assert "|copy |" in out
    assert "bits_per_byte" in out
    assert get_model("heedful") is HeedfulLM
    (written,) = tmp_path.rglob("results*.json")
    assert '"kv_budget": 8' in written.read_text()


def test_tasks_of_ones_own_stay_ones_own(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    for words, added in (
        (["--help"], []),
        (["ls", "tasks"], ["--include_path", str(TASKS)]),
        (["--tasks", "a", "--include_path", "mine"], []),
        (["--tasks", "a", "--include_path=mine"], []),
    ):
        monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
        main()
        assert seen.pop() == [*words, *added]


def test_the_entry_point():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "lm_eval.models"
    ]
    registry: Registry = Registry("model")
    for name, value in declared.items():
        registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert list(declared) == [NAME]
    assert registry.get(NAME) is HeedfulLM

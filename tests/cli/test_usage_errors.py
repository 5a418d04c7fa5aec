"""Wrong usage: exit code 2, one line that says what could have been meant, nothing written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Heedful = Callable[..., Any]

WRONG: dict[str, tuple[str, tuple[str, ...]]] = {
    "command": ("trian", ("unknown command 'trian'; did you mean 'train'?", "commands: train, compare")),
    "strange-command": ("xyzzy", ("unknown command 'xyzzy'; commands:",)),
    "flag": ("train --d-modle 4", ("--d-modle", "did you mean --d-model?", "see heedful train --help")),
    "strange-flag": ("train --xyzzy 4", ("--xyzzy", "see heedful train --help")),
    "extra": ("ls extra", ("extra", "see heedful ls --help")),
    "number": ("train --steps abc", ("--steps", "'abc'")),
    "no-value": ("train --steps", ("--steps needs a value: ",)),
    "no-form": ("train --attention", ("--attention needs a value: ",)),
    "flag-for-value": ("train --steps --lr 1", ("--steps needs a value",)),
    "equals": ("train --steps=1.5", ("--steps takes a whole number, got '1.5'",)),
    "choice": ("train --tokenizer words", ("'words'", "--tokenizer", "bpe")),
    "missing": ("generate", ("RUN", "folder of a trained model")),
    "form": ("train --attention sass", ("--attention: unknown attention 'sass'; did you mean 'sas'?",)),
    "score": ("train --score=selektive", ("--score: unknown score 'selektive'; did you mean 'selective'?",)),
    "compare-form": ("compare --attention mha,sass", ("unknown attention 'sass'; did you mean 'sas'?",)),
    "show": ("show selectiv", ("unknown form 'selectiv'; did you mean 'selective'?", "forms: mha, mqa")),
    "heads": (
        "train --attention sas --n-heads 4 --attention.sim-heads 7",
        ("sim_heads must be a multiple of n_heads (4), got 7; use 4 or 8",),
    ),
    "compare-heads": (
        "compare --attention.sim-heads 7",
        ("sim_heads must be a multiple of n_heads (4), got 7",),
    ),
    "option": (
        "train --attention sas --attention.sim-head 8",
        ("--attention.sim-head", "did you mean --attention.sim-heads?"),
    ),
    "form-not-chosen": (
        "compare --attention mha,mqa --score.gate-bias 3",
        ("unknown option --score.gate-bias here: it is an option of score forgetting, which is not chosen",),
    ),
    "task-too-long": (
        "compare --data synthetic:copy --task.symbols 1048576",
        ("--task.symbols 1048576 takes rows of 2,097,154 tokens, and --context is 256: at most 127 fit",),
    ),
    "no-task": ("train --task.pairs 4", ("--task.pairs here: it is an option of --data synthetic:mqar",)),
    "foreign-option": ("train --attention mha --attention.sim-heads 8", ("--attention.sim-heads",)),
    "steps": ("train --steps -5", ("--steps must be 1 or more, got -5",)),
    "compare-steps": ("compare --steps -5", ("--steps must be 1 or more, got -5",)),
    "lr": ("train --lr 0", ("--lr must be greater than 0",)),
    "width": ("train --d-model 15", ("d_model must be a multiple of n_heads (4), got 15; use 12 or 16",)),
    "gqa": ("train --attention gqa", ("'gqa' needs n_kv_heads", "--n-kv-heads 2")),
    "compare-gqa": ("compare --attention gqa --n-heads 8", ("(8)", "(on the command line: --n-kv-heads 2)")),
    "groups": ("train --n-kv-heads 2", ("'mha' has 4 key/value heads by definition",)),
    "seeds": ("compare --seeds 0", ("--seeds must be 1 or more, got 0",)),
    "sweep": (
        "compare --lr-sweep 0.01,abc",
        ("--lr-sweep takes numbers separated by commas, got 'abc' in '0.01,abc'",),
    ),
    "baseline-steps": (
        "compare --baseline-steps 2.5",
        ("--baseline-steps takes whole numbers separated by commas, got '2.5'",),
    ),
    "no-forms": ("compare --attention ,", ("--attention and --score need at least one form each",)),
    "twice": ("compare --attention mha,mha", ("--attention names a form twice: mha,mha",)),
    "match": ("compare --match flops", ("--match flops cannot be reached: sas x softmax", "--match none")),
    "tokens": ("generate run --max-new-tokens 0", ("--max-new-tokens must be 1 or more, got 0",)),
    "temperature": ("generate run --temperature -1", ("--temperature must be 0 or more and finite, got -1",)),
    "temperature inf": ("generate run --temperature inf", ("0 or more and finite, got inf",)),
    "digits": ("train --steps ５", ("--steps takes a whole number, got '５'",)),
    "digits of a number": ("train --lr ٣", ("--lr takes a number, got '٣'",)),
    "digits of a budget": ("generate run x --kv-budget ６４", ("--kv-budget takes a number", "got '６４'")),
    "no budget": (
        "generate run x --kv-budget=",
        ("--kv-budget takes a number, one per layer, or full; got ''",),
    ),
    "no budget to prove": ("doctor run --kv-budget=", ("--kv-budget takes a number", "got ''")),
    "no default budget": ("convert run x --kv-budget=", ("--kv-budget takes a number", "got ''")),
    "prompt": ("generate run caf\udce9", ("PROMPT must be UTF-8 text, got 'caf\\udce9'",)),
    "temperature nan": ("generate run --temperature nan", ("0 or more and finite, got nan",)),
    "small budget": ("generate run x --kv-budget 1", ("budget must be a whole number >= 2", "got 1")),
    "threshold": ("generate run x --kv-threshold nan", ("threshold", "got nan")),
    "policy": ("generate run x --kv-budget 4 --kv-policy stream", ("did you mean 'streaming'",)),
    "top-k": ("generate run --top-k -1", ("--top-k must be 0 or more, got -1",)),
    "forms-value": ("ls --forms", ("--forms needs a file or a module",)),
    "forms-file": ("--forms nowhere.py ls", ("--forms: there is no file nowhere.py",)),
    "forms-module": ("--forms=no_such_module ls", ("no_such_module cannot be imported", "ModuleNotFound")),
}


@pytest.mark.parametrize(("line", "parts"), WRONG.values(), ids=WRONG.keys())
def test_wrong_usage(
    heedful: Heedful, line: str, parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = heedful(*line.split())
    message = done.error(2)
    for part in parts:
        assert part in message
    assert "UsageError" not in message
    assert done.out == ""
    assert not list(tmp_path.iterdir())


def test_traceback_on_request(heedful: Heedful, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HEEDFUL_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        heedful("generate", "nowhere")

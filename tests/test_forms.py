"""Forms named by files: found here and in processes that begin later, and what is wrong with them is said."""

import os
from pathlib import Path

import pytest

from heedful.attention.registry import SCORES
from heedful.forms import VARIABLE, load_forms, name_forms

FORM = """
from heedful.attention import SoftmaxScore, register_score
@register_score("{name}")
class Mine(SoftmaxScore):
    pass
"""


def test_named_once_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "")
    path = tmp_path / "mine_of_test_forms.py"
    path.write_text(FORM.format(name="mine_of_test_forms"))
    name_forms([str(path)])
    name_forms([str(path), "json"])
    assert os.environ[VARIABLE] == f"{path},json"
    load_forms()
    form = SCORES["mine_of_test_forms"].module_class
    load_forms()
    assert SCORES["mine_of_test_forms"].module_class is form
    del SCORES.forms["mine_of_test_forms"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "there is no file"),
        ("import nothing_of_that_name", ImportError, "cannot be imported: ModuleNotFoundError"),
        ("1 / 0", ImportError, "cannot be imported: ZeroDivisionError"),
        ("def", ImportError, "cannot be imported: SyntaxError"),
    ],
)
def test_what_is_wrong(
    text: str | None, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "wrong_of_test_forms.py"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))
    for _ in range(2):  # nothing half-loaded is left behind
        with pytest.raises(error, match=message):
            load_forms()

"""results/README.md says what the raw data beside it say."""

from pathlib import Path

import pytest
import results_page

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HEEDFUL_FORMS", "")  # a study that is read adds its own forms


def test_the_page_is_up_to_date():
    page = results_page.PAGE.read_text(encoding="utf-8")
    assert results_page.written(page) == page, "run python benchmarks/results_page.py"


def test_the_figure_is_up_to_date():
    shown = results_page.shown(results_page.first_verdicts())
    assert results_page.text_of(results_page.FIGURE) == shown, "run python benchmarks/results_page.py"


def test_a_figure_says_what_it_shows(tmp_path: Path):
    firsts = results_page.first_verdicts()[:3]
    results_page.draw_verdicts(firsts, tmp_path / "verdicts.png")
    assert results_page.text_of(tmp_path / "verdicts.png") == results_page.shown(firsts)
    assert results_page.shown(firsts) != results_page.shown(firsts[:2])


def test_every_study_has_a_place():
    assert {p.stem for p in results_page.FOLDER.glob("*.toml")} == set(results_page.LETTERS)


def test_a_table_without_a_place_is_said():
    with pytest.raises(ValueError, match="one place <!-- tasks -->"):
        results_page.written("# What came out\n")

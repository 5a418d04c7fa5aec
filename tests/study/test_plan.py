"""The file of a study: what it means, and what is wrong with it before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heedful.study import Study, load_study

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "studies").glob("*.toml"))
Make = Callable[..., Study]


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_every_study_here_is_sound(path: Path, scale: Any):
    text = path.read_text()
    if scale == "gpu" and "[scale.gpu" not in text and "base/text.toml" not in text:
        with pytest.raises(ValueError, match=r"no \[scale\.gpu\] in it"):
            load_study(path.stem, scale, path.parent)
        return
    study = load_study(path.stem, scale, path.parent, data="large.txt" if scale == "gpu" else None)
    assert study.contrasts and study.limits and study.needed >= 2
    for arm in study.arms.values():
        arm.to_decoder_config(arm.vocab_size, arm.context).parameter_count()


def test_arms_share_what_is_common(study: Make):
    s = study(
        arms={
            "mha": {},
            "sas": {"attention": "sas", "attention_options": {"sim_heads": 4}},
            "equal": {"attention": "sas", "match": "params", "to": "mha"},
        },
        train={"d_model": 32, "n_heads": 2, "n_layers": 1, "context": 32, "d_ff": 128},
        contrasts=[{"arm": "sas", "against": "mha", "claims": "lower"}],
    )
    assert s.baseline == "mha" and {a.d_model for a in s.arms.values()} == {32}
    assert s.arms["sas"].attention_options == {"sim_heads": 4}
    counts = {n: a.to_decoder_config(257, 32).parameter_count() for n, a in s.arms.items()}
    assert abs(counts["equal"] / counts["mha"] - 1) < 0.01 < counts["sas"] / counts["mha"] - 1


def test_other_data(written: Callable[..., Path]):
    path = written(train={"data": "austen", "steps": 5000, "batch_size": 64, "context": 64})
    with pytest.raises(
        ValueError, match="reads 20 M tokens, and 'austen' has half a million; name a larger text"
    ):
        load_study(str(path))
    assert {arm.data for arm in load_study(str(path), data="large.txt").arms.values()} == {"large.txt"}


def test_another_scale(written: Callable[..., Path]):
    path = written(
        scale={"gpu": {"seeds": 3, "train": {"d_model": 32}, "arms": {"mqa": {"attention": "mqa"}}}}
    )
    small, large = (load_study(str(path), scale) for scale in ("cpu", "gpu"))
    assert (small.seeds, large.seeds) == (2, 3)
    assert [a.d_model for a in small.arms.values()] == [16, 16]
    assert {n: a.d_model for n, a in large.arms.items()} == {"mha": 32, "selective": 32, "mqa": 32}


def test_a_file_like_another(written: Callable[..., Path]):
    path = written(train={"d_model": 32, "n_heads": 4})
    base = path.with_name("base.toml")
    base.write_text(path.read_text())
    path.write_text(
        'like = "base.toml"\nseeds = 7\nclaim = "another"\n[train]\nd_model = 16\n[arms.sas]\nattention="sas"\n'
    )
    study = load_study(str(path))
    assert (study.seeds, study.claim, study.title) == (7, "another", "Votes")
    assert {n: (a.attention, a.d_model, a.n_heads) for n, a in study.arms.items()} == {
        "mha": ("mha", 16, 4),
        "selective": ("mha", 16, 4),
        "sas": ("sas", 16, 4),
    }
    base.unlink()
    with pytest.raises(ValueError, match=r"it is like 'base\.toml', and there is no .*base\.toml"):
        load_study(str(path))


CACHES = {"kept": [4, 8], "policies": {"selective": ["selective"], "softmax": ["streaming", "h2o"]}}


@pytest.mark.parametrize(
    ("contrast", "changed", "says"),
    [
        ({"smaller": 8}, {"budgets": None}, "caches of 'selective', which .budgets. does not measure"),
        (
            {"smaller": 8},
            {"budgets": {**CACHES, "arms": ["mha"]}},
            "caches of 'selective', which .budgets. does not",
        ),
        ({"smaller": 0}, {}, "smaller must be a whole number of 1 or more, got 0"),
        ({"against_smaller": 2.0}, {}, "against_smaller must be a whole number of 1 or more, got 2.0"),
        ({"smaller": 3}, {}, "caches of 'selective' with 10 tokens; kept has 4, 8"),
        (
            {"smaller": 8, "against_policy": "tova"},
            {},
            "caches of 'mha' under 'tova', which is none of its policies",
        ),
        (
            {"smaller": 8},
            {"metric": "accuracy at 4x"},
            "compared by loss or accuracy, and metric is 'accuracy at 4x'",
        ),
        ({}, {"budgets": {**CACHES, "arms": ["mhha"]}}, "has no 'mhha'; did you mean 'mha'"),
    ],
)
def test_caches_that_are_not_measured(
    study: Make, contrast: dict[str, Any], changed: dict[str, Any], says: str
):
    one = {"arm": "selective", "against": "mha", "claims": "lower", **contrast}
    with pytest.raises(ValueError, match=says):
        study(**{"contrasts": [one], "budgets": CACHES, **changed})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a word": ({"effekt": 0.1}, "a study has no 'effekt'; did you mean 'effect'"),
    "nothing claimed": ({"claim": None}, "claim is missing"),
    "no contrasts": ({"contrasts": None}, "contrasts is missing"),
    "an effect in words": ({"effect": "big"}, "effect must be a finite number, got 'big'"),
    "half a seed": ({"seeds": 2.5}, "seeds must be a whole number, got 2.5"),
    "a rate alone": ({"rates": 1e-3}, "rates must be a list of finite numbers, got 0.001"),
    "rates in words": ({"rates": "12"}, "rates must be a list of finite numbers, got '12'"),
    "a rate below 0": ({"rates": [-1.0]}, "rates must name a learning rate at least, all greater than 0"),
    "lengths in words": ({"lengths": ["a"]}, "lengths must be a list of whole numbers"),
    "a length below 1": ({"lengths": [-5]}, "lengths are numbers of steps of 1 or more"),
    "the baseline's own length": ({"lengths": [4]}, r"other than those of the baseline \(4\), got"),
    "an arm in a word": ({"arms": {"mha": {}, "b": "softmax"}}, "arms must be a table of tables"),
    "a form in a word": ({"forms": "abc"}, "forms must be a list of files, got 'abc'"),
    "an arm's rate": ({"arms": {"mha": {}, "b": {"lr": 0.5}}}, "lr is none of a study's settings: every arm"),
    "an arm's seed": ({"arms": {"mha": {}, "b": {"seed": 3}}}, "seed is none of a study's settings"),
    "a word of a scale": ({"scale": {"cpu": {"stepz": 3}}}, "scale.cpu has no 'stepz'"),
    "a rate twice": (
        {"rates": [1e-3, 1.0000001e-3]},
        "rates has a learning rate twice, to six digits: 0.001",
    ),
    "steps in words": (
        {"arms": {"mha": {}, "b": {"steps": "4"}}},
        "'b': steps must be a whole number, got '4'",
    ),
    "half a step": ({"arms": {"mha": {}, "b": {"steps": 4.5}}}, "steps must be a whole number, got 4.5"),
    "no whole number": (
        {"arms": {"mha": {}, "b": {"steps": True}}},
        "steps must be a whole number, got True",
    ),
    "data in numbers": ({"arms": {"mha": {}, "b": {"data": 4}}}, "data must be text, got 4"),
    "the name of a length": (
        {"lengths": [8], "arms": {"mha": {}, "mha-steps8": {}}, "contrasts": []},
        "arm 'mha-steps8' has the name of a run of `lengths`",
    ),
    "a contrast twice": (
        {"contrasts": 2 * [{"arm": "selective", "against": "mha", "claims": "lower"}]},
        "a contrast of 'selective' with 'mha' stands there twice",
    ),
    "arms of a contrast": (
        {"contrasts": [{"arm": ["mha"], "against": "mha", "claims": "lower"}]},
        r"arm must be text, got \['mha'\]",
    ),
    "positions that end": (
        {
            "metric": "accuracy at 2x",
            "arms": {"mha": {}, "b": {"positions": "learned"}},
            "contrasts": [],
            "train": {"data": "synthetic:copy", "context": 2200, "task_options": {"symbols": 1050}},
        },
        "arm 'b' has learned positions, 2200 of them, and metric 'accuracy at 2x' reads 42",
    ),
    "half a match": ({"arms": {"mha": {}, "b": {"to": "mha"}}}, "arm 'b' needs `match` and `to`"),
    "an arm elsewhere": (
        {"arms": {"mha": {}, "../b": {}}},
        "without / and not beginning with a dot, got '../b'",
    ),
    "nothing to draw against": (
        {"x": "contxt"},
        "x must be a setting .* got 'contxt'; did you mean 'context'",
    ),
    "right answers of a text": (
        {"metric": "accuracy"},
        "metric 'accuracy' is of synthetic tasks, and arm 'mha'",
    ),
    "an arm against itself": (
        {"contrasts": [{"arm": "mha", "against": "mha", "claims": "lower"}]},
        "a contrast is of 'mha' against itself",
    ),
    "a score of budgets": (
        {"budgets": {"kept": [4], "policies": {"sofmax": ["streaming"]}}},
        "policies of score 'sofmax'; did you mean 'softmax'",
    ),
    "a policy": (
        {"budgets": {"kept": [4], "policies": {"softmax": ["h2oo"]}}},
        "eviction has no 'h2oo'; did you mean 'h2o'",
    ),
    "nothing kept": (
        {"budgets": {"kept": [0], "policies": {"softmax": ["h2o"]}}},
        "kept must be a list of whole numbers of 1 or more",
    ),
    "an arm": ({"arms": {"mha": {}, "b": {"score": "selektive"}}}, "arm 'b': unknown score 'selektive'"),
    "an arm's word": ({"arms": {"mha": {}, "b": {"heads": 3}}}, "arm 'b' has no 'heads'"),
    "one arm": ({"arms": {"selective": {}}}, "two arms or more"),
    "a match": ({"arms": {"mha": {}, "b": {"match": "params", "to": "c"}}}, "matches 'c', which is no arm"),
    "another match": ({"arms": {"mha": {}, "b": {"match": "size", "to": "mha"}}}, "must be params or flops"),
    "a contrast": (
        {"contrasts": [{"arm": "selektive", "against": "mha", "claims": "lower"}]},
        "names 'selektive'; did you mean 'selective'",
    ),
    "its claim": (
        {"contrasts": [{"arm": "selective", "against": "mha", "claims": "better"}]},
        "claims must be one of lower, higher, equal, got 'better'",
    ),
    "its metric": (
        {"contrasts": [{"arm": "selective", "against": "mha", "claims": "lower", "metric": "accuracy"}]},
        "studies of accuracy, and one of accuracy, accuracy at 2x, accuracy at 4x; got 'accuracy'",
    ),
    "a metric": ({"metric": "speed"}, "metric must be one of loss, accuracy"),
    "no effect": ({"effect": 0}, "effect must be greater than 0"),
    "one seed": ({"seeds": 1}, "seeds must be 2 or more"),
    "no rates": ({"rates": []}, "rates must name"),
    "a setting": ({"train": {"d_model": 15, "n_heads": 2}}, "arm 'mha': .*d_model"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong(study: Make, changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=rf"votes\.toml: .*{message}"):
        study(**changed)


def test_a_name_that_is_no_study(tmp_path: Path, written: Callable[..., Path]):
    with pytest.raises(FileNotFoundError, match=r"there is no .*/\*\.toml here"):
        load_study("votes", folder=tmp_path)
    written()
    with pytest.raises(FileNotFoundError, match="did you mean 'votes'"):
        load_study("vote", folder=tmp_path / "studies")
    (tmp_path / "studies" / "votes.toml").write_text("title = ")
    with pytest.raises(ValueError, match=r"votes\.toml: Invalid value"):
        load_study("votes", folder=tmp_path / "studies")

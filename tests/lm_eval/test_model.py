"""The model `heedful` of lm-evaluation-harness: figures by hand, the stock harness, and what is refused."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason='pip install "heedful[tasks]"')

from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from heedful.attention.eviction import POLICIES
from heedful.hf.load import load_model, load_tokenizer
from heedful.lm_eval.model import HeedfulLM

Ask = Callable[..., list[Any]]
PAIRS = [
    ("the cat sat on a mat", " and saw a dog run"),
    ("a dog", " sat on the cat and the mat and the run"),
    ("", "the dog saw a cat on a mat"),
    ("the cat and the dog and the cat sat on the mat and", " run"),
    ("the cat and the dog and the cat sat on the mat and", " saw"),
]
TEXTS = ["the cat sat on a mat and saw a dog run and the dog sat", "a cat"]
BUDGETS: list[dict[str, Any]] = [
    {"kv_budget": 5, "kv_policy": "streaming", "kv_first": 2},
    {"kv_budget": 6, "kv_policy": "h2o", "kv_grace": 2},
    *({"kv_budget": 6, "kv_policy": policy} for policy in POLICIES if policy not in ("streaming", "h2o")),
]


@functools.cache
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_model(folder), load_tokenizer(folder)


def by_hand(folder: Path, context: str, continuation: str, **kv: Any) -> float:
    """A log-likelihood from `evaluate_nll`; texts of a trained model begin with the start token, and empty ones."""
    model, tokenizer = loaded(folder)
    start = [tokenizer.bos_token_id] if model.config.model_type == "heedful" or not context else []
    before = tokenizer(context)["input_ids"] if context else []
    ids = start + tokenizer(context + continuation)["input_ids"]
    nll = model.evaluate_nll(torch.tensor([ids]), reduction="none", **kv)[0]
    return -nll[len(start) + len(before) - 1 :].sum().item()


@pytest.mark.parametrize(
    "which, kv",
    [("trained", {"kv_budget": 6}), *(("voting", kv) for kv in BUDGETS)],
    ids=["trained-selective", *(f"voting-{kv['kv_policy']}" for kv in BUDGETS)],
)
def test_log_likelihoods_are_those_of_evaluate_nll(
    which: str, kv: dict[str, Any], request: pytest.FixtureRequest, ask: Ask
):
    folder: Path = request.getfixturevalue(which)
    expected = [by_hand(folder, *pair, **kv) for pair in PAIRS]
    full = [by_hand(folder, *pair) for pair in PAIRS]
    assert max(abs(a - b) for a, b in zip(expected, full, strict=True)) > 1e-3  # the budget matters
    for batch_size in (1, 4):
        lm = HeedfulLM(folder, batch_size=batch_size, **kv)
        found = [answer[0] for answer in lm.loglikelihood(ask("loglikelihood", *PAIRS), disable_tqdm=True)]
        assert found == pytest.approx(expected, abs=2e-4)
        assert (lm.held, lm.evicted) == (kv["kv_budget"], True)


@pytest.mark.parametrize("which", ["trained", "voting"])
def test_rolling_reads_a_text_piece_by_piece(which: str, request: pytest.FixtureRequest, ask: Ask):
    folder: Path = request.getfixturevalue(which)
    model, tokenizer = loaded(folder)
    expected = []
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        last = len(ids) - 1
        total = 0.0
        for start in range(0, last, 16):
            # The last piece is moved back, so that it is as long as the others; what was predicted does not count.
            begin = max(0, min(start, last - 16))
            nll = model.evaluate_nll(torch.tensor([ids[begin : start + 17]]), kv_budget=6, reduction="none")
            total -= nll[0, start - begin :].sum().item()
        expected.append(total)
    requests = ask("loglikelihood_rolling", *((text,) for text in TEXTS))
    for batch_size in (1, 3):
        lm = HeedfulLM(folder, kv_budget=6, max_length=16, batch_size=batch_size)
        assert lm.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("which", ["trained", "voting"])
def test_texts_are_those_of_generate(which: str, request: pytest.FixtureRequest, ask: Ask):
    folder: Path = request.getfixturevalue(which)
    model, tokenizer = loaded(folder)
    contexts = ["the cat sat on a mat", "a dog", "the dog saw a run and the cat"]
    start = [tokenizer.bos_token_id] if model.config.model_type == "heedful" else []
    expected, full = [], []
    for context in contexts:
        ids = torch.tensor([start + tokenizer(context)["input_ids"]])
        for texts, budget in ((expected, 5), (full, "full")):
            mask = torch.ones_like(ids)
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=12, do_sample=False, kv_budget=budget
            )
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    if which == "voting":
        assert expected != full  # the budget matters
    settings = {"max_gen_toks": 12, "until": [], "do_sample": False}
    requests = ask("generate_until", *((context, settings) for context in contexts))
    for batch_size in (1, 3):
        lm = HeedfulLM(folder, kv_budget=5, batch_size=batch_size)
        assert lm.generate_until(requests, disable_tqdm=True) == expected
        assert (lm.held, lm.evicted) == (5, True)


def test_the_full_cache_is_the_stock_harness_on_the_source(stock: Path, converted: Path, ask: Ask):
    theirs, ours = HFLM(str(stock), batch_size=2, device="cpu"), HeedfulLM(converted, batch_size=2)
    pairs, texts = ask("loglikelihood", *PAIRS), ask("loglikelihood_rolling", *((text,) for text in TEXTS))
    settings = {"max_gen_toks": 8, "until": ["\n"], "do_sample": False}
    contexts = ask("generate_until", *((text, settings) for text in TEXTS))
    for expected, found in zip(theirs.loglikelihood(pairs), ours.loglikelihood(pairs), strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-4)
        assert found[1] == expected[1]
    expected_texts = theirs.loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected_texts, abs=1e-4)
    assert ours.generate_until(contexts) == theirs.generate_until(contexts)
    assert not ours.evicted


def test_what_is_left_out_is_as_the_model_says(voting: Path, tmp_path: Path, ask: Ask):
    model = load_model(voting)
    model.generation_config.kv_budget, model.generation_config.kv_policy = 5, "streaming"
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((voting / name).read_bytes())
    pair = ask("loglikelihood", PAIRS[0])
    for asked, held in (
        ({}, {"kv_budget": 5, "kv_policy": "streaming"}),
        ({"kv_budget": 7}, {"kv_budget": 7, "kv_policy": "streaming"}),
        ({"kv_policy": "tova"}, {"kv_budget": 5, "kv_policy": "tova"}),
        ({"kv_budget": "full"}, {"kv_budget": "full"}),
    ):
        lm = HeedfulLM(tmp_path, **asked)
        expected = by_hand(voting, *PAIRS[0], **held)
        assert lm.loglikelihood(pair, disable_tqdm=True)[0][0] == pytest.approx(expected, abs=2e-4)
    text, settings = "the cat sat on a mat and", {"max_gen_toks": 8, "until": [], "do_sample": False}
    lm = HeedfulLM(tmp_path, kv_budget=6, kv_policy="tova")
    lm.generate_until(ask("generate_until", (text, settings)), disable_tqdm=True)
    assert lm.model.resolve_eviction(lm.eviction).policy == "tova"  # nothing of the saved one is mixed in
    assert lm.held == 6


def test_a_request_that_is_the_same_but_for_its_last_token_is_read_once(voting: Path, ask: Ask):
    lm = HeedfulLM(voting, kv_budget=6, batch_size=1)
    seen: list[tuple[int, int]] = []
    lm.report = lambda done, total: seen.append((done, total))
    lm.loglikelihood(ask("loglikelihood", *PAIRS[3:]))
    assert seen == [(1, 2), (2, 2)]


def refused(match: str, folder: Path, **arguments: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        HeedfulLM(folder, **arguments)
    assert "\n" not in str(caught.value)


def test_what_would_not_be_obeyed_is_refused(trained: Path, converted: Path, monkeypatch: pytest.MonkeyPatch):
    refused("'kv_bugdet' is not known; did you mean 'kv_budget'", trained, kv_bugdet=8)
    refused("'trust_remote_code' is not known", trained, trust_remote_code=True)
    refused("'parallelize' is not known", trained, parallelize=True)
    refused("dtype must be auto or a type of torch", trained, dtype="float99")
    refused("nothing is evicted without", trained, kv_policy="streaming")
    refused("one entry per layer", trained, kv_budget=[8, 8, 8])
    refused("unknown eviction policy 'best'", trained, kv_budget=8, kv_policy="best")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("one process", converted, kv_budget=8)


def test_a_policy_needs_votes(stock: Path, tmp_path: Path):
    import heedful

    heedful.convert(stock, tmp_path / "out", score="softmax")
    refused("needs a model with score 'selective'", tmp_path / "out", kv_budget=8)


def test_answers_are_not_taken_from_a_store(trained: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="use_cache keeps answers by the request alone"):
        CachingLM(HeedfulLM(trained, kv_budget=8), str(tmp_path / "store.db"))


@pytest.mark.parametrize("name", ["kv_budget", "use_cache", "past_key_values"])
def test_a_task_cannot_set_the_cache(trained: Path, ask: Ask, name: str):
    lm = HeedfulLM(trained, kv_budget=8)
    with pytest.raises(ValueError, match=f"'{name}' is no setting of a task"):
        lm.generate_until(ask("generate_until", ("the cat", {"until": [], "max_gen_toks": 4, name: 4})))


@pytest.mark.parametrize("which", ["trained", "converted"])
def test_the_stock_model_refuses_budgets(which: str, request: pytest.FixtureRequest):
    with pytest.raises(TypeError, match="kv_budget"):
        HFLM(str(request.getfixturevalue(which)), kv_budget=8, device="cpu")


def test_no_model_no_tokenizer(trained: Path, stock: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HeedfulLM(tmp_path / "none")
    refused("heedful convert", stock)
    for file in trained.glob("*.*"):
        if file.is_file() and not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        HeedfulLM(tmp_path)


def test_batch_size_auto_goes_through_the_budget(voting: Path, ask: Ask):
    requests = ask("loglikelihood", *PAIRS)
    one = HeedfulLM(voting, kv_budget=6).loglikelihood(requests, disable_tqdm=True)
    auto = HeedfulLM(voting, kv_budget=6, batch_size="auto", max_batch_size=4, max_length=64)
    for found, expected in zip(auto.loglikelihood(requests, disable_tqdm=True), one, strict=True):
        assert math.isclose(found[0], expected[0], abs_tol=2e-4)


def test_another_type(voting: Path, ask: Ask):
    lm = HeedfulLM(voting, kv_budget=6, dtype="float64")
    assert lm.get_model_info()["model_dtype"] == "torch.float64"
    found = lm.loglikelihood(ask("loglikelihood", *PAIRS), disable_tqdm=True)
    expected = [by_hand(voting, *pair, kv_budget=6) for pair in PAIRS]
    assert [answer[0] for answer in found] == pytest.approx(expected, abs=2e-4)

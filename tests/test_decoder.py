"""The torch-only language model: its arithmetic, its caches, its layers by name."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from heedful import Decoder, DecoderConfig, LayerCache

SIZES: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_positions": 32}
FORMS = [(a, s) for a in ("mha", "mqa", "gqa", "sas") for s in ("softmax", "selective")]
MIXED: dict[str, Any] = {
    "attention": ["mha", "sas"],
    "attention_options": [{}, {"sim_heads": 8, "init": "identity"}],
    "score": ["selective", "softmax"],
    "score_options": [{"impl": "sdpa"}, {}],
}


def fields(attention: str = "mha", score: str = "softmax", **more: Any) -> dict[str, Any]:
    """A small model whose logits are large enough for everything to matter."""
    kv = {"n_kv_heads": 2} if attention == "gqa" else {}
    return {**SIZES, "attention": attention, "score": score, "init_logit_std": 1.0, **kv, **more}


def decoder(*args: Any, **more: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(**fields(*args, **more)).double().eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab_size"], (batch, length), generator=generator)


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "untied": {"tie_embeddings": False},
    "learned": {"positions": "learned"},
    "no-positions": {"positions": "none"},
    "gpt": {"block": "gpt", "positions": "learned"},
    "no-qk-norm": {"qk_norm": False},
    "bias": {"attention_bias": True},
    "narrow-heads": {"head_dim": 4},
    "d_ff": {"d_ff": 37},
    "one-layer": {"n_layers": 1},
    "mixed": MIXED,
}


def counted(variants: list[str]) -> list[Any]:
    forms = [pytest.param(fields(a, s), id=f"{a}-{s}") for a, s in FORMS]
    return forms + [pytest.param(fields(**VARIANTS[v]), id=v) for v in variants]


@pytest.mark.parametrize("of", counted(list(VARIANTS)))
def test_parameter_count_is_exact(of: dict[str, Any]):
    config = DecoderConfig(**of)
    assert config.parameter_count() == sum(p.numel() for p in Decoder(config).parameters())


@pytest.mark.parametrize("of", counted([*VARIANTS]))
@pytest.mark.parametrize("context", [1, 16])
def test_flops_per_token_is_exact(of: dict[str, Any], context: int):
    config = DecoderConfig(**of)
    plain = dataclasses.replace(config, score_options={"impl": "reference"})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Decoder(plain)(tokens(1, context))
    assert config.flops_per_token(context) == plain.flops_per_token(context)
    assert config.flops_per_token(context) * context == counter.get_total_flops()


@pytest.mark.parametrize(("attention", "score"), FORMS)
def test_cache_bytes_per_token(attention: str, score: str):
    config = DecoderConfig(**fields(attention, score))
    model = Decoder(config)
    caches = model.new_cache()
    with torch.no_grad():
        model(tokens(1, 7), caches=caches)
    assert sum(c.used_bytes for c in caches) == 7 * config.cache_bytes_per_token(4)


def test_layers_by_name():
    model = decoder(**MIXED)
    first, second = (layer.attention for layer in model.layers)
    assert (type(first).__name__, type(second).__name__) == ("GroupedQueryAttention", "SASAttention")
    assert (type(first.score).__name__, type(second.score).__name__) == ("SelectiveScore", "SoftmaxScore")
    assert second.config.sim_heads == 8
    assert first.config.score_config.impl == "sdpa"
    assert second.config.score_config.impl == "auto"


def test_positions():
    ids = tokens(1, 8)
    swapped = ids[:, [1, 0, *range(2, 8)]]
    for positions, changes in (("rope", True), ("learned", True), ("none", False)):
        model = decoder(positions=positions, n_layers=1)
        assert (model.embed_positions is not None) == (positions == "learned")
        with torch.no_grad():
            same = torch.allclose(model(ids)[:, 2:], model(swapped)[:, 2:], atol=1e-12)
        assert same != changes, positions


def test_learned_positions_end():
    model = decoder(positions="learned", max_positions=8)
    model(tokens(1, 8))
    with pytest.raises(ValueError, match="learned positions end at 8, got a sequence of 9 tokens; shorten"):
        model(tokens(1, 9))
    caches = model.new_cache()
    with torch.no_grad():
        model(tokens(1, 8), caches=caches)
        with pytest.raises(ValueError, match="learned positions end at 8"):
            model(tokens(1, 1), caches=caches)


def test_tied_embeddings():
    tied, untied = decoder(), decoder(tie_embeddings=False)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)


@pytest.mark.parametrize("of", counted(["learned", "no-positions", "mixed"]))
@given(cuts=st.sets(st.integers(1, 11)))
def test_cached_equals_full(of: dict[str, Any], cuts: set[int]):
    torch.manual_seed(0)
    model = Decoder(**of).double()
    ids, caches = tokens(), model.new_cache()
    edges = [0, *sorted(cuts), 12]
    with torch.no_grad():
        pieces = [model(ids[:, a:b], caches=caches) for a, b in itertools.pairwise(edges)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("of", counted(["learned", "no-positions", "mixed"]))
def test_packed_equals_separate(of: dict[str, Any]):
    torch.manual_seed(0)
    model = Decoder(**of).double()
    ids = tokens(1, 12)
    segments = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    with torch.no_grad():
        alone = [model(piece) for piece in ids.split([5, 4, 3], dim=1)]
        torch.testing.assert_close(model(ids, segment_ids=segments), torch.cat(alone, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("of", counted(["learned", "no-positions", "mixed"]))
def test_left_padding_changes_nothing(of: dict[str, Any]):
    torch.manual_seed(0)
    model = Decoder(**of).double()
    ids, caches = tokens(2, 10), model.new_cache()
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :4] = False
    with torch.no_grad():
        padded = model(ids, key_mask=mask)
        torch.testing.assert_close(padded[:1, 4:], model(ids[:1, 4:]), rtol=0, atol=1e-9)
        torch.testing.assert_close(padded[1:], model(ids[1:]), rtol=0, atol=1e-9)
        pieces = [model(ids[:, a:b], key_mask=mask[:, a:b], caches=caches) for a, b in ((0, 3), (3, 10))]
        torch.testing.assert_close(torch.cat(pieces, 1)[mask], padded[mask], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("attention", "score"), [("mha", "softmax"), ("sas", "selective")])
def test_gradient_checkpointing_changes_nothing(attention: str, score: str):
    model = decoder(attention, score).train()
    gradients = []
    for on in (False, True):
        model.gradient_checkpointing = on
        model.zero_grad()
        model(tokens()).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(fields("sas", "selective"), marks=pytest.mark.slow),
        pytest.param(fields("mha", "softmax", positions="learned"), marks=pytest.mark.slow),
        fields(**MIXED),
    ],
)
def test_compiles_without_graph_breaks(of: dict[str, Any]):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Decoder(**of)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens()), model(tokens()))
    segments = torch.tensor([[0] * 5 + [1] * 7] * 2)
    torch.testing.assert_close(
        compiled(tokens(), segment_ids=segments), model(tokens(), segment_ids=segments)
    )


@pytest.mark.parametrize("score", ["softmax", "selective"])
@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk-norm", "no-qk-norm"])
@pytest.mark.parametrize("host", ["mha", "gqa"])
def test_identity_start_equals_the_host(score: str, positions: str, qk_norm: bool, host: str):
    """Same weights but the expansions: a whole SAS model is its host at step 0."""
    torch.manual_seed(0)
    plain = Decoder(**fields(host, score, positions=positions, qk_norm=qk_norm))
    sas = Decoder(
        **fields(
            "sas",
            score,
            positions=positions,
            qk_norm=qk_norm,
            n_kv_heads=plain.config.n_kv_heads,
            attention_options={"init": "identity", "sim_heads": 12, "sim_head_dim": 12},
        )
    )
    shared = {
        name: weight
        for name, weight in plain.state_dict().items()
        if "q_norm" not in name and "k_norm" not in name  # D̂ gains, that carry the scale
    }
    missing, unexpected = sas.load_state_dict(shared, strict=False)
    assert not unexpected
    assert all("expand" in name or "_norm" in name for name in missing)
    ids = tokens(3, 20)
    with torch.no_grad():
        expected = plain(ids)
        assert expected.std() > 0.5
        torch.testing.assert_close(sas(ids), expected, rtol=0, atol=1e-5)


def test_training_learns():
    torch.manual_seed(0)
    model = Decoder(**fields("sas", "selective"))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    ids = torch.arange(12)[None].repeat(2, 1)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no-vocabulary": ({"vocab_size": 0}, "vocab_size must be a whole number >= 1, got 0"),
    "float-layers": ({"n_layers": 2.0}, r"n_layers must be a whole number >= 1, got 2\.0"),
    "d_ff": ({"d_ff": 0}, "d_ff must be a whole number >= 1, got 0"),
    "heads": ({"n_heads": 5}, r"d_model must be a multiple of n_heads \(5\), got 32; use 30 or 35"),
    "positions": ({"positions": "alibi"}, "positions must be 'rope' or 'learned' or 'none', got 'alibi'"),
    "name": ({"attention": "sass"}, "unknown attention 'sass'; did you mean 'sas'?"),
    "score": ({"score": "selectiv"}, "unknown score 'selectiv'; did you mean 'selective'?"),
    "option": ({"attention": "sas", "attention_options": {"sim_head": 8}}, "did you mean 'sim_heads'?"),
    "foreign-option": ({"attention_options": {"sim_heads": 8}}, "'mha' has no option 'sim_heads'"),
    "shared-option": ({"attention_options": {"rope": False}}, "'mha' has no option 'rope'"),
    "sim-heads": (
        {"attention": "sas", "attention_options": {"sim_heads": 7}},
        r"sim_heads must be a multiple of n_heads \(4\), got 7; use 4 or 8",
    ),
    "too-few-layers": ({"attention": ["mha"]}, r"attention must have one entry per layer \(2\), got 1"),
    "too-many-options": ({"score_options": [{}] * 3}, "score_options must have one entry per layer"),
    "mha-groups": (
        {"n_kv_heads": 2},
        "attention 'mha' has 4 key/value heads by definition, got n_kv_heads=2",
    ),
    "gqa-unsaid": ({"attention": "gqa"}, "attention 'gqa' needs n_kv_heads, a divisor of n_heads"),
    "odd-head": ({"head_dim": 7}, "rotary positions need an even head_dim, got 7; use 6 or 8, or rope=False"),
    "init": ({"init_logit_std": 0.0}, "init_logit_std must be a number greater than 0, got 0.0"),
    "norm": ({"qk_norm_position": "later"}, "qk_norm_position must be"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_contradictions_raise(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**SIZES, **wrong})
    with pytest.raises(ValueError, match=message):
        Decoder(**{**SIZES, **wrong})


def test_padding_on_the_right_needs_no_more_learned_positions():
    torch.manual_seed(0)
    decoder = Decoder(
        vocab_size=20, d_model=16, n_layers=1, n_heads=2, positions="learned", max_positions=4
    ).eval()
    ids = torch.randint(0, 20, (2, 5))
    mask = torch.tensor([[True] * 4 + [False], [True] * 3 + [False] * 2])
    out = decoder(ids, key_mask=mask)
    torch.testing.assert_close(out[0, :4], decoder(ids[:1, :4])[0])
    with pytest.raises(ValueError, match="learned positions end at 4"):
        decoder(ids)


def test_caches_must_be_one_per_layer():
    decoder = Decoder(vocab_size=20, d_model=16, n_layers=2, n_heads=2)
    shared = [LayerCache()] * 2
    with pytest.raises(ValueError, match="one cache of its own for each of the 2 layers"):
        decoder(torch.zeros(1, 3, dtype=torch.long), caches=shared)
    with pytest.raises(TypeError, match="not both"):
        Decoder(decoder.config, n_layers=7)


def test_dropout_is_for_training_alone():
    torch.manual_seed(0)
    plain, dropping = Decoder(**fields()), Decoder(**fields(dropout=0.25))
    dropping.load_state_dict(plain.state_dict())
    ids = tokens()
    assert torch.equal(dropping.eval()(ids), plain.eval()(ids))
    dropping.train()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(dropping(ids))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_dropout_is_on_both_branches_of_a_block():
    """Each adds a mean-preserving share of its output: a quarter of it zero, the rest 4/3 as large."""
    block: Any = Decoder(**fields(dropout=0.25, n_layers=1)).layers[0].train()
    seen: list[tuple[Tensor, Tensor]] = []
    block.dropout.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    x = torch.randn(4, 16, SIZES["d_model"])
    out = block(x, torch.arange(16)[None])
    assert len(seen) == 2
    for whole, dropped in seen:
        zero = dropped == 0
        assert 0.2 < zero.float().mean() < 0.3
        torch.testing.assert_close(dropped[~zero], whole[~zero] / 0.75)
    torch.testing.assert_close(out, x + seen[0][1] + seen[1][1])


def test_no_dropout_draws_no_random_numbers():
    model = Decoder(**fields()).train()
    before = torch.get_rng_state()
    model(tokens())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan"), "0.1"])
def test_dropout_is_a_share(dropout: Any):
    with pytest.raises(ValueError, match=r"dropout must be a number from 0 to below 1, got"):
        DecoderConfig(**fields(dropout=dropout))

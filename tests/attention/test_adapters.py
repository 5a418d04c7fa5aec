"""Whatever is put around a layer inside of an attention counts: adapters, hooks, pruning, parametrizations."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from heedful import Decoder, available, build
from heedful.attention import Attention, LayerCache, param_groups
from heedful.attention.params import decayed_names
from heedful.attention.plain import is_plain

OPTIONS: dict[str, dict[str, Any]] = {"gqa": {"n_kv_heads": 2}}
# A score wraps no layer of an attention: each attention with two of them, and each score with one.
FORMS = [
    pytest.param(a, s, marks=[] if a == "gqa" or s in ("softmax", "selective") else pytest.mark.exhaustive)
    for a in available()["attention"]
    for s in available()["score"]
]
SAS = [{"cache": "expanded"}, {"cache": "compact"}, {"qk_norm_position": "after_rope"}, {"qk_norm": False}]


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The layers with parameters of their own."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.RMSNorm)}


def make(attention: str, score: str, **options: Any) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "n_heads": 4, "init_logit_std": 1.0, "bias": True}
    module = build(attention, score, **sizes, **OPTIONS.get(attention, {}), **options).double()
    return module, torch.randn(2, 7, 16, dtype=torch.float64)


class Wrapped(nn.Module):
    """A stranger's layer without any of the attributes of the one it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def wrap(module: nn.Module, name: str, wrapper: Callable[[nn.Module], nn.Module] = Wrapped) -> nn.Module:
    """Replace a layer of the module by a wrapper around it."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, wrapper(module.get_submodule(name)))
    return module


@pytest.mark.parametrize(("attention", "score"), FORMS)
def test_hooks_of_every_layer_fire(attention: str, score: str):
    module, x = make(attention, score)
    plain = module(x)
    fired: list[str] = []
    for name, layer in module.named_modules():
        layer.register_forward_hook(lambda layer, given, out, name=name: fired.append(name))
    torch.testing.assert_close(module(x), plain, rtol=0, atol=1e-12)
    assert sorted(fired) == sorted(name for name, _ in module.named_modules())


@pytest.mark.parametrize("options", SAS, ids=str)
@pytest.mark.parametrize("layer", ["q_norm", "k_norm", "o_proj", "q_proj"])
def test_a_hook_that_changes_a_layers_output_changes_ours(layer: str, options: dict[str, Any]):
    module, x = make("sas", "selective", **options)
    if layer.endswith("norm") and not options.get("qk_norm", True):
        return
    before = module(x)
    handle = module.get_submodule(layer).register_forward_hook(lambda layer, given, out: -2 * out)
    changed = module(x)
    assert (changed - before).abs().max() > 1e-3
    handle.remove()
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", SAS, ids=str)
def test_every_expansion_layer_may_be_wrapped(options: dict[str, Any]):
    """One layer at a time, so that every mixture of called and read layers is taken; outputs and gradients."""
    module, x = make("sas", "selective", **options)
    x.requires_grad_()
    weights = list(module.parameters())
    expected = module(x)
    gradients = torch.autograd.grad(expected.square().sum(), [x, *weights])
    for name in layers_of(module):
        wrapped = wrap(copy.copy(module), name) if "." not in name else wrap(copy.deepcopy(module), name)
        assert not is_plain(wrapped.get_submodule(name))
        torch.testing.assert_close(wrapped(x), expected, rtol=0, atol=1e-12, msg=name)
        got = torch.autograd.grad(wrapped(x).square().sum(), [x, *wrapped.parameters()])
        sizes = sorted(g.norm().item() for g in got), sorted(g.norm().item() for g in gradients)
        torch.testing.assert_close(*map(torch.tensor, sizes), rtol=1e-8, atol=1e-10, msg=name)


def test_wrapped_layers_go_through_the_caches():
    for cache_kind in ("expanded", "compact"):
        module, x = make("sas", "selective", cache=cache_kind)
        for name in layers_of(module):
            wrap(module, name)
        cache = LayerCache()
        with torch.no_grad():
            parts = [module(x[:, :3], cache=cache), *(module(t, cache=cache) for t in x[:, 3:].split(1, 1))]
            torch.testing.assert_close(torch.cat(parts, dim=1), module(x), rtol=0, atol=1e-12)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


def normed(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(0.5)  # the length of the rows


def hooked_norm(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [pruned, normed, hooked_norm], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("attention", "score"), FORMS)
def test_pruned_and_parametrized_layers_count(attention: str, score: str, change: Callable[..., None]):
    """The outputs are those of a plain module with the changed weights, and training reaches the originals."""
    module, x = make(attention, score)
    plain = copy.deepcopy(module)
    for layer in layers_of(module).values():
        if not isinstance(layer, nn.RMSNorm) or change is pruned:  # a vector of gains has no rows
            change(layer)
    module(x)  # hooks make the weights anew
    with torch.no_grad():
        for name, layer in layers_of(module).items():
            assert isinstance(layer, nn.RMSNorm) or not torch.equal(
                layer.weight, plain.get_submodule(name).weight
            )
            plain.get_submodule(name).weight.copy_(layer.weight)
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=1e-12)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):  # a weight that was read would still be that of the first graph
        module(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("attention", "score"), FORMS)
def test_dynamic_quantisation(attention: str, score: str):
    module, x = make(attention, score)
    module, x = module.float().eval(), x.float()
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    replaced = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(replaced) == sum(isinstance(m, nn.Linear) for m in module.modules())
    with torch.no_grad():
        got, expected = quantised(x), module(x)
        assert not torch.equal(got, expected)
        assert (got - expected).norm() / expected.norm() < 0.05
        cache = LayerCache()
        steps = torch.cat([quantised(token, cache=cache) for token in x.split(1, dim=1)], dim=1)
        # every call chooses a scale for its activations anew
        assert (steps - expected).norm() / expected.norm() < 0.05
    param_groups(quantised, 0.1)


@pytest.mark.parametrize(("attention", "score"), FORMS)
def test_functional_call_with_other_weights(attention: str, score: str):
    module, x = make(attention, score)
    other, _ = make(attention, score)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    weights = dict(other.named_parameters())
    torch.testing.assert_close(
        torch.func.functional_call(module, weights, (x,)), other(x), rtol=0, atol=1e-12
    )


def test_global_hooks_see_every_layer():
    module, x = make("sas", "softmax")
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, given, out: seen.append(layer))
    try:
        module(x)
    finally:
        handle.remove()
    assert {id(layer) for layer in seen} == {id(layer) for layer in module.modules()}


def test_what_is_plain():
    linear, conv, norm = nn.Linear(2, 2), nn.Conv1d(2, 2, 3, padding=1), nn.RMSNorm(2, eps=1e-6)
    assert is_plain(linear, conv, norm) and is_plain()
    not_plain = {
        "wrapped": Wrapped(linear),
        "subclass": nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2),
        "no padding": nn.Conv1d(2, 2, 3),
        "dilated": nn.Conv1d(2, 2, 3, padding=1, dilation=2),
        "no gains": nn.RMSNorm(2, eps=1e-6, elementwise_affine=False),
        "epsilon of the dtype": nn.RMSNorm(2),
    }
    for name, layer in not_plain.items():
        assert not is_plain(linear, layer), name
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(linear, f"register_{register}")(lambda *args: None)
        assert not is_plain(linear), register
        handle.remove()
        assert is_plain(linear)
    linear.forward = lambda x: x  # what dispatching libraries do
    assert not is_plain(linear)


@pytest.mark.parametrize("change", [pruned, normed], ids=lambda f: f.__name__)
def test_changed_layers_keep_their_identity_out_of_weight_decay(change: Callable[..., None]):
    module, _ = make("sas", "softmax", init="identity")
    names = set(decayed_names(module))
    assert "q_expand.conv2.weight" in names and "q_expand.conv1.weight" not in names
    change(module.q_expand.conv1)
    change(module.k_expand.lin1)
    new = {n for n, p in module.named_parameters() if p.ndim > 1} - set(decayed_names(module))
    big = {n for n in new if module.get_parameter(n).numel() > module.config.qk_dim}
    assert {n.rsplit(".weight", 1)[0].removesuffix(".parametrizations") for n in big} >= {
        "q_expand.conv1",
        "k_expand.lin1",
    }
    assert not any("conv2" in n or "lin2" in n or "proj" in n for n in new)


@pytest.mark.parametrize("qk_norm_position", ["before_rope", "after_rope"])
@pytest.mark.parametrize("attention", ["mha", "sas"])
def test_logit_bound_with_a_foreign_norm(attention: str, qk_norm_position: str):
    """The bound that certifies evictions holds for what the norm gives, not for the gains it holds."""
    module, x = make(attention, "selective", qk_norm_position=qk_norm_position)
    module.q_norm.register_forward_hook(lambda layer, given, out: 50 * out)
    wrap(module, "k_norm")
    positions = torch.arange(7)[None]
    q, memory = module.project(x, positions)
    k, _ = module.keys_values(memory)
    real = torch.ones(2, 7, dtype=torch.bool)
    sizes = module.logit_sizes(q, k, real, real)
    logits = q @ k.transpose(-1, -2) * module.config.qk_dim**-0.5
    bound = sizes.prod(-1)
    assert (logits.abs().amax((1, 2, 3)) <= bound * (1 + 1e-12)).all()
    measured = q.norm(dim=-1).amax() * k.norm(dim=-1).amax() * module.config.qk_dim**-0.5
    assert bound.max() <= measured * (1 + 1e-12)


# PEFT: an adapter around every linear, and around the convolutions.


def language_model(attention: str, score: str) -> nn.Module:
    torch.manual_seed(0)
    return Decoder(
        vocab_size=17,
        d_model=16,
        n_layers=2,
        n_heads=4,
        attention=attention,
        score=score,
        **({"n_kv_heads": 2} if attention == "gqa" else {}),
    ).double()


@pytest.mark.parametrize("targets", ["linears", "everything"])
@pytest.mark.parametrize(("attention", "score"), FORMS)
def test_lora(attention: str, score: str, targets: str):
    peft = pytest.importorskip("peft")
    model = language_model(attention, score)
    kinds = nn.Linear if targets == "linears" else nn.Linear | nn.Conv1d
    names = [n for n, m in model.named_modules() if isinstance(m, kinds) and n != "lm_head"]
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=names, init_lora_weights=False)
    ids = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(1))
    before = model(ids)
    adapted = peft.get_peft_model(model, config)
    out = adapted(ids)
    assert (out - before).abs().max() > 1e-3
    out.square().sum().backward()
    adapters = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert len(adapters) == 2 * len(names)
    without = [n for n, p in adapters.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(ids), before, rtol=0, atol=1e-10)
    merged = adapted.merge_and_unload()
    assert all(is_plain(m) for m in merged.modules() if isinstance(m, nn.Linear | nn.Conv1d))
    torch.testing.assert_close(merged(ids), out, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("attention", "score"), FORMS)
def test_lora_all_linear_of_the_transformers_face(attention: str, score: str):
    """`target_modules="all-linear"`: every adapter gets a gradient, merged and unmerged generate the same."""
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("heedful.hf")
    torch.manual_seed(0)
    config = hf.HeedfulConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention=attention,
        score=score,
        **({"num_key_value_heads": 2} if attention == "gqa" else {}),
    )
    lora = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = peft.get_peft_model(hf.HeedfulForCausalLM(config), lora).train()
    ids = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert adapters and [n for n, p in adapters.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    model.eval()
    with torch.no_grad():
        unmerged = model(input_ids=ids).logits
        torch.testing.assert_close(
            model.merge_and_unload()(input_ids=ids).logits, unmerged, rtol=1e-4, atol=1e-4
        )

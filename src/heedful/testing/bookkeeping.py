"""Promises about names and predictions: checkpoints, parameters, FLOPs, cache bytes, optimizer groups."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from heedful.attention import LayerCache, param_groups
from heedful.testing.promise import Case, assert_close, assert_equal, promise


@promise
def state_dict_is_stable(case: Case) -> None:
    """A module rebuilt from its config takes the state dict, which holds the parameters and nothing else."""
    first, second, x = case.module(), case.module(), case.tokens()
    state = first.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert_equal("rebuilt", {n: tuple(t.shape) for n, t in second.state_dict().items()}, shapes)
    extra = sorted(state.keys() ^ {name for name, _ in first.named_parameters()})
    assert_equal("names that are no parameters", extra, [])
    assert (second(x) != first(x)).any(), "two random modules gave the same output before loading"
    second.load_state_dict(state)
    assert_close("after loading", second(x), first(x), tolerance=0.0)


@promise
def parameter_count_is_exact(case: Case) -> None:
    """config.parameter_count() is the number of parameters."""
    real = sum(parameter.numel() for parameter in case.config.build().parameters())
    assert_equal("parameter_count()", case.config.parameter_count(), real)


@promise
def flops_are_exact(case: Case) -> None:
    """config.flops_per_token(context) is what torch counts in a forward pass of the reference."""
    # float64: torch's counter misses the float32 CPU kernels of oneDNN.
    module = case.module(config=case.config.reference())
    for length in (case.length, 2 * case.length):
        x = case.tokens(length=length)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x)
        real = counter.get_total_flops() / (case.batch * length)
        assert_equal(f"flops_per_token({length})", float(case.config.flops_per_token(length)), real)


@promise
def cache_bytes_are_exact(case: Case) -> None:
    """config.cache_bytes_per_token(bytes) is what one more token takes in a LayerCache."""
    for dtype in (torch.float32, torch.bfloat16):
        module, x = case.module(dtype), case.tokens(dtype)
        cache, used = LayerCache(), []
        with torch.no_grad():
            for token in x.split(1, dim=1):
                module(token, cache=cache)
                used.append(cache.used_bytes)
        real = (used[-1] - used[0]) / (case.batch * (case.length - 1))
        predicted = case.config.cache_bytes_per_token(dtype.itemsize)
        assert_equal(f"cache_bytes_per_token({dtype.itemsize})", float(predicted), real)


@promise
def parameters_have_one_group(case: Case) -> None:
    """param_groups puts every parameter into exactly one group and decays matrices only."""
    module = case.module()
    decayed, kept = (group["params"] for group in param_groups(module, 0.1))
    grouped = sorted(id(parameter) for parameter in decayed + kept)
    assert_equal("grouped parameters", grouped, sorted(id(p) for p in module.parameters()))
    assert_equal("decayed norms or biases", sum(p.ndim < 2 for p in decayed), 0)

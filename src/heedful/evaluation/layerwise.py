"""A forward pass that begins at some layer of a causal model, with what entered that layer before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def layers_of(model: Any) -> nn.ModuleList:
    """The layers of a trained or converted model: the outermost list of as many modules."""
    n = model.config.num_hidden_layers
    return next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == n)


@contextmanager
def starting_at(layers: nn.ModuleList, first: int, x: Tensor | None) -> Iterator[list[Tensor]]:
    """While it lasts, forward passes skip the layers before `first`, which then is given `x`.

    Args:
        layers: those of the model.
        first: the first that runs.
        x: (B, T, C), what enters it; None, with `first` 0: what the model makes of its tokens.

    Returns:
        A list that receives what enters each layer, (B, T, C), from `first` on.
    """
    entered: list[Tensor] = []

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = args[0] if args else kwargs["hidden_states"]
        given = x if x is not None and not entered else own
        entered.append(given)
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

    skipped = {str(i): layers[i] for i in range(first)}
    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers[first:]]
    for name, layer in skipped.items():
        layers._modules[name] = _Skipped(layer)
    try:
        yield entered
    finally:
        layers._modules.update(skipped)
        for hook in hooks:
            hook.remove()


class _Skipped(nn.Module):
    """Stands for a layer that is not run: hidden states go through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: nothing may find it here

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # such as what kind of attention it has

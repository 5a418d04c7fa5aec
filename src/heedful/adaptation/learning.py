"""What is done to the layers of a converted model while it learns; nothing of it is left afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adaptation.objective import local_loss
from heedful.attention.score import EvictableScore, Select, given
from heedful.hf.converted.model import attention_layers
from heedful.ops.eviction import Rule, departures

SHARE = 64
"""Votes start as logits over it: F is a sum over up to thousands of them, and has a sound size like this."""


def learning_layers(model: nn.Module) -> list[Any]:
    """The attention modules of a converted model that select, by layer."""
    return [layer for layer in attention_layers(model) if not layer.slides]


@contextmanager
def local_losses(model: nn.Module, *, grace: int, first: int) -> Iterator[list[Tensor]]:
    """While it lasts, every forward pass appends the `local_loss` of each layer that selects."""
    losses: list[Tensor] = []

    def see(score: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        q, k, _ = args
        cap = getattr(score, "softcap", None)
        safe: dict[str, Any] = {"grace": grace, "first": first, "softcap": cap}
        own = score.selection(kwargs["x"].detach(), kwargs["scale"])
        losses.append(local_loss(q.detach(), k.detach(), own[:2], kwargs["scale"], own.own_votes, **safe))

    hooks = [layer.score.register_forward_pre_hook(see, with_kwargs=True) for layer in learning_layers(model)]
    try:
        yield losses
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def start_selectors(model: nn.Module, sizes: list[float]) -> None:
    """Start values from which selectors learn: votes that are the same for every token, which is recency.

    Those of selection heads must be small. When they summed to a slope of 0.02 a token, half of the layers of
    SmolLM2-135M unlearned voting altogether, and a relu without votes has no gradient to come back by; 0.003 went
    well everywhere.

    Args:
        model: a converted model.
        sizes: of the layers' inputs (`input_sizes`); selection heads see them scaled to size 1.
    """
    for layer, size in zip(learning_layers(model), sizes, strict=True):
        score = layer.score
        shape = (score.selectors, score.config.select_dim)
        score.reset_parameters()
        if score.config.selector == "retention":
            score.retain[0].weight.div_(size)
            continue
        for linear, share, level in (
            (score.select_q, SHARE, 0.1),
            (score.select_k, 1, 2.0 * shape[1] ** 0.5),
        ):
            linear.weight.div_(size * share)
            linear.bias.zero_()
            linear.bias.view(shape)[:, 0] = level / share


@torch.no_grad()
def input_sizes(model: nn.Module, ids: Tensor) -> list[float]:
    """The root mean square of what each layer that selects is given."""
    sizes: dict[int, float] = {}

    def see(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        sizes[layer.layer_idx] = float(x.float().square().mean().sqrt())

    layers = learning_layers(model)
    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [sizes[layer.layer_idx] for layer in layers]


class _Forgetting:
    """A score that attends to what a rule leaves, with gradients: training meets what a cache will hold."""

    at_work: "Forgetting"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        state: dict[str, Tensor],
        scale: float,
        select: Select = None,
        **masks: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `EvictableScore.attend_pruned`, where each key head of a selector is a row of its own."""
        score: Any = self
        rule = self.at_work.rule
        if rule is None:
            everything: Any = super()
            return everything.forward(q, k, v, x=x, state=state, scale=scale, **given(select), **masks)
        apart = score.selectors

        def rows(t: Tensor) -> Tensor:
            return t.unflatten(1, (apart, -1)).flatten(0, 1)

        own = score.selection(x, scale)
        if own is not None:
            select = rows(own.q), rows(own.k)
            if own.own_votes is not None:
                state = {name: rows(own.own_votes) for name in score.state_names}
        q, k, v = rows(q), rows(k), rows(v)
        positions = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)

        def evict(votes: Tensor | None) -> Tensor:
            # where nobody votes the oldest goes
            rated = q.new_zeros(*positions.shape, q.shape[2]) if votes is None else votes.detach()
            return departures(rule, rated, positions)

        out, _ = EvictableScore.attend_pruned(
            score, q, k, v, x=x, state=state, positions=positions, scale=scale, evict=evict, **given(select)
        )
        return out.unflatten(0, (-1, apart)).flatten(1, 2), {}


@cache
def _forgetting_class(score: type) -> Any:
    return type(f"Forgetting{score.__name__}", (_Forgetting, score), {"__module__": __name__})


class Forgetting:
    """While it lasts, the layers of a converted model that select evict, in training too.

    Args:
        model: the model; its scores change their class, their parameters keep their names.
        rule: who goes; may be changed, None: nobody.
    """

    def __init__(self, model: nn.Module, rule: Rule | None) -> None:
        self.scores = [layer.score for layer in learning_layers(model)]
        self.rule = rule

    def __enter__(self) -> "Forgetting":
        for score in self.scores:
            kind: Any = type(score)
            score.__class__ = _forgetting_class(kind)
            score.at_work = self
        return self

    def __exit__(self, *error: object) -> None:
        for score in self.scores:
            score.__class__ = type(score).__bases__[1]
            del score.at_work

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Nobody goes in here."""
        rule, self.rule = self.rule, None
        try:
            yield
        finally:
            self.rule = rule

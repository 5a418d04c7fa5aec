"""The signature of a class that is built from the fields of a config, for completion, `help` and errors."""

import inspect
from dataclasses import fields
from typing import Any

from heedful.ops.checks import did_you_mean

EVERYTHING = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def config_parameters(config_class: Any) -> list[inspect.Parameter]:
    """The fields of a config as parameters, with their types and defaults."""
    made = {f.name: f.default_factory for f in fields(config_class)}
    parameters = []
    for parameter in inspect.signature(config_class).parameters.values():
        factory = made[parameter.name]
        parameters.append(parameter.replace(default=factory()) if callable(factory) else parameter)
    return parameters


class ConfigSignature:
    """As `__signature__` of a class: the fields of its `Config`, as long as `__init__` takes `*args, **kwargs`.

    A class that writes an `__init__` with parameters of its own shows those.
    """

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature:
        """The signature of the class; an instance has that of its call."""
        own = list(inspect.signature(owner.__init__).parameters.values())[1:]
        if instance is not None or [p.kind for p in own] != EVERYTHING:
            raise AttributeError("__signature__")
        return inspect.Signature(config_parameters(owner.Config))


def check_keywords(what: str, given: Any, config_class: Any, advice: str = "") -> None:
    """Raise for a keyword that is no field of the config, naming the nearest one and all there are.

    Args:
        what: the class that was called.
        given: the names of the keywords.
        config_class: the config whose fields they should be.
        advice: more to say where no name is near.

    Raises:
        TypeError: as Python does for an unknown keyword.
    """
    known = [f.name for f in fields(config_class)]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or advice
            raise TypeError(f"{what} has no argument {name!r}; {hint}arguments: {', '.join(known)}")

"""The two registries: names of Attention forms and of Score forms, for configs, the CLI and strangers."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from heedful.ops.checks import did_you_mean


@dataclasses.dataclass(frozen=True)
class Form:
    """One registered name: the module that computes it and the config that describes it."""

    name: str
    module_class: Any
    config_class: Any

    @property
    def summary(self) -> str:
        """The first line of what the form says about itself."""
        return (self.config_class.__doc__ or self.module_class.__doc__ or "").strip().split("\n")[0]

    @property
    def options(self) -> list[str]:
        """The names of the config's fields."""
        return [f.name for f in dataclasses.fields(self.config_class)]


class Registry:
    """Names to forms; an unknown name says what it could have been."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.forms: dict[str, Form] = {}

    def register(self, name: str, *, config: Any = None) -> Callable[[Any], Any]:
        """Decorator: make a class available under `name`.

        Args:
            name: letters, digits and underscores.
            config: the config class of this name; default the class's own `Config`.

        Raises:
            ValueError: if the name is malformed or taken by another class.
        """
        if not name.isidentifier():
            raise ValueError(f"{self.kind} name must be letters, digits and _, got {name!r}")

        def add(module_class: Any) -> Any:
            taken = self.forms.get(name)
            if taken and _where(taken.module_class) != _where(module_class):
                raise ValueError(
                    f"{self.kind} {name!r} is already {_where(taken.module_class)}; choose another name"
                )
            config_class = config or module_class.Config
            own = config is not None or "Config" in vars(module_class)
            if not own or vars(config_class).get("form", name) != name:
                # An inherited config, or one that bears another name: this name needs its own class.
                place = {"__module__": module_class.__module__, "__doc__": None}
                config_class = type("Config", (config_class,), place)
                config_class.__qualname__ = f"{module_class.__qualname__}.Config"  # where pickle finds it
            config_class.form = name
            if config is None:
                module_class.Config = config_class
            self.forms[name] = Form(name, module_class, config_class)
            return module_class

        return add

    def __getitem__(self, name: str) -> Form:
        if not isinstance(name, str) or name not in self.forms:
            hint = did_you_mean(name, self.forms, cutoff=0.5)
            raise ValueError(
                f"unknown {self.kind} {name!r}; {hint}available: {', '.join(self.forms)}. "
                f"A form of your own must be imported before it is named "
                f"(on the command line: --forms my_form.py, or HEEDFUL_FORMS=my_form.py)"
            )
        return self.forms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)


def _where(module_class: Any) -> str:
    """Module and name: the same for a file that is loaded again, as notebooks do."""
    return f"{module_class.__module__}.{module_class.__qualname__}"


ATTENTIONS = Registry("attention")
SCORES = Registry("score")
register_attention = ATTENTIONS.register
register_score = SCORES.register


def available() -> dict[str, list[str]]:
    """The registered names: `{"attention": [...], "score": [...]}`."""
    return {"attention": list(ATTENTIONS), "score": list(SCORES)}

"""PEFT looks up what to adapt by the type of a model; converted types are given what their source's have."""

import sys

from heedful.hf.converted.known import FAMILIES, PREFIX


def tell_peft() -> None:
    """Enter the model types of converted models wherever PEFT knows those of their sources, if PEFT is imported."""
    known = getattr(sys.modules.get("peft.utils.constants"), "__dict__", {})
    for name, modules in list(known.items()):
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            modules.update({PREFIX + family: modules[family] for family in FAMILIES if family in modules})

"""The language model for the Hugging Face world; importing this registers it with the Auto classes."""

from heedful.hf import version  # noqa: F401  raises where transformers is missing or was not tested

# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from heedful.hf.backbone import HeedfulForSequenceClassification, HeedfulModel
from heedful.hf.cache import HeedfulCache
from heedful.hf.configuration import HeedfulConfig
from heedful.hf.convert import from_decoder, to_decoder
from heedful.hf.converted.families import register_configs
from heedful.hf.modeling import HeedfulForCausalLM

AutoConfig.register("heedful", HeedfulConfig, exist_ok=True)
AutoModel.register(HeedfulConfig, HeedfulModel, exist_ok=True)
AutoModelForCausalLM.register(HeedfulConfig, HeedfulForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HeedfulConfig, HeedfulForSequenceClassification, exist_ok=True)
register_configs()

__all__ = [
    "HeedfulCache",
    "HeedfulConfig",
    "HeedfulForCausalLM",
    "HeedfulForSequenceClassification",
    "HeedfulModel",
    "from_decoder",
    "to_decoder",
]

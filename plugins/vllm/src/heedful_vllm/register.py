"""What is told to vLLM's registries."""

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

from heedful.hf.converted.families import architecture_of
from heedful.hf.converted.known import FAMILIES

ARCHITECTURES = "HeedfulForCausalLM", *(architecture_of(family) for family in FAMILIES)
"""As they stand in config.json."""
BACKEND = MambaAttentionBackendEnum.CUSTOM


class HeedfulArch(ModelArchConfigConvertorBase):
    """What vLLM asks of the config of a model that heedful trained, whose number of key heads may be the form's."""

    def get_total_num_kv_heads(self) -> int:
        """G; H where the config leaves it to the form. Nothing of ours is sized by it."""
        return (
            getattr(self.hf_text_config, "num_key_value_heads", None) or self.get_total_num_attention_heads()
        )


def register_all() -> None:
    """The model of every architecture, what its configuration has to be, and the backend that reads batches."""
    from heedful_vllm.settings import HeedfulEngineConfig

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, "heedful_vllm.model:BoundedForCausalLM")
        MODELS_CONFIG_MAP[name] = HeedfulEngineConfig
    MODEL_ARCH_CONFIG_CONVERTORS["heedful"] = HeedfulArch
    register_backend(BACKEND, "heedful_vllm.backend.BoundedBackend", is_mamba=True)

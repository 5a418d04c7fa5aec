"""What is told to vLLM's registries."""

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

from heedful.hf.converted.families import architecture_of
from heedful.hf.converted.known import FAMILIES

ARCHITECTURES = "HeedfulForCausalLM", *(architecture_of(family) for family in FAMILIES)
"""As they stand in config.json."""
BACKEND = MambaAttentionBackendEnum.CUSTOM


def register_all() -> None:
    """The model of every architecture, what its configuration has to be, and the backend that reads batches."""
    from heedful_vllm.settings import HeedfulEngineConfig

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, "heedful_vllm.model:BoundedForCausalLM")
        MODELS_CONFIG_MAP[name] = HeedfulEngineConfig
    register_backend(BACKEND, "heedful_vllm.backend.BoundedBackend", is_mamba=True)

"""What an engine's configuration has to be for heedful's models: what fits is filled in, the rest refused."""

from typing import TYPE_CHECKING, Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.model_executor.models.config import MambaModelConfig

from heedful.attention.eviction import Eviction

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "heedful"
"""The part of vLLM's --additional-config that is ours: {"heedful": {"kv_budget": 512}}."""
OPTIONS = "kv_budget", "kv_policy", "kv_evict_every", "kv_threshold", "kv_grace", "kv_first"


class HeedfulEngineConfig(MambaModelConfig):
    """Called by vLLM for every architecture of heedful's."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Fill in what follows from the budget.

        Raises:
            ValueError: for what cannot be done with a memory of fixed size, or is not done yet.
        """
        asked_for(vllm_config)
        if reason := refusal(vllm_config):
            raise ValueError(f"heedful: {reason}")
        # the model is transformers' own, run as it stands
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        super().verify_and_update_config(vllm_config)


def asked_for(vllm_config: "VllmConfig") -> dict[str, Any]:
    """The options that begin with kv_, from --additional-config; what is left out is the model's own.

    Raises:
        ValueError: for an option that there is not.
    """
    given = vllm_config.additional_config
    options = dict(given.get(KEY) or {}) if isinstance(given, dict) else {}
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(
            f"heedful: --additional-config has unknown options {unknown}; expected {', '.join(OPTIONS)}"
        )
    Eviction.of(**options)
    return options


def refusal(vllm_config: "VllmConfig") -> str | None:
    """Why this engine cannot be, or None."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        return (
            "tensor and pipeline parallelism are not supported: the model runs whole in one process; use "
            "--data-parallel-size for more of them"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism splits keys by position; a bounded memory holds any of them: leave it out"
    if vllm_config.speculative_config is not None:
        return (
            "speculative decoding is not supported: rejected tokens would have to be taken back from a memory "
            "that has overwritten others for them; leave out --speculative-config"
        )
    if vllm_config.kv_transfer_config is not None:
        return "KV connectors move paged keys and values, and a bounded memory has none; leave them out"
    if cache.cache_dtype != "auto":
        return f"--kv-cache-dtype {cache.cache_dtype} is not supported; keys and values keep the model's"
    if vllm_config.lora_config is not None:
        return "LoRA adapters of the engine are not supported; merge them into the model (heedful adapt does)"
    if vllm_config.quant_config is not None:
        return "quantized weights are not supported"
    if vllm_config.load_config.load_format not in ("auto", "hf", "safetensors"):
        return (
            f"--load-format {vllm_config.load_config.load_format} is not supported; the model is safetensors"
        )
    return None

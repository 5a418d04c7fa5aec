"""heedful's models as vLLM runs them: the model itself over the tokens of all requests, a block for each."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching
from vllm.sequence import IntermediateTensors

from heedful.hf.load import load_model
from heedful_vllm.bounded import Bounded
from heedful_vllm.metrics import FOLDER, metrics_for
from heedful_vllm.register import BACKEND
from heedful_vllm.settings import asked_for

logger = init_logger("vllm.heedful")


class Memory(MambaBase, nn.Module):
    """What vLLM knows of a request's memory: a state of fixed size, which holds the slots of all layers."""

    def __init__(self, name: str, vllm_config: VllmConfig, bounded: Bounded) -> None:
        nn.Module.__init__(self)
        self.bounded = bounded
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        """The bytes of one request."""
        return ((self.bounded.layout.nbytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Bytes."""
        return (torch.uint8,)

    @property
    def mamba_type(self) -> Any:
        """The backend that reads batches for us."""
        return BACKEND

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the memory that the engine allotted."""
        super().bind_kv_cache(kv_cache)
        self.bounded.blocks.bind(self.kv_cache[0])


class BoundedForCausalLM(nn.Module, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching):
    """Any model that heedful trained or converted."""

    NAME = "heedful.memory.0"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config
        self.model = load_model(config.model).to(config.dtype)
        asked = self.model.resolve_eviction(**asked_for(vllm_config))
        self.bounded = Bounded(self.model, asked, config.max_model_len)
        self.memory = Memory(self.NAME, vllm_config, self.bounded)
        self.metrics = metrics_for(self.bounded, str(config.served_model_name))
        self._say(config.max_model_len)

    def _say(self, longest: int) -> None:
        """One line on what is bounded, and by how much."""
        own = self.bounded
        if self.metrics is None:
            logger.info("heedful: /metrics has no heedful_... without %s; `heedful serve` sets it", FOLDER)
        small = own.layout.nbytes < 2**20
        each = f"{own.layout.nbytes / 2**10:,.0f} KiB" if small else f"{own.layout.nbytes / 2**20:,.1f} MiB"
        if not own.evicts:
            logger.warning(
                "heedful: no budget, so that each layer holds all of up to %s tokens: %s for each request; give a "
                "kv_budget to bound it",
                *(f"{longest:,}", each),
            )
            return
        least, most = min(own.budgets), max(own.budgets)
        logger.info(
            "heedful: each layer holds %s of up to %s tokens (who goes: %s): %s for each request, however long",
            f"{most:,}" if least == most else f"{least:,} to {most:,}",
            *(f"{longest:,}", own.eviction.policy, each),
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """(N,) token ids to (N, C)."""
        return self.model.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(N,) tokens of all requests, side by side, to (N, C)."""
        if input_ids is None:
            raise ValueError("heedful: prompts of embeddings are not supported; give token ids")
        metadata = get_forward_context().attn_metadata
        batch = None if metadata is None else metadata[self.NAME]
        out = self.bounded.forward(input_ids, positions, batch)
        if batch is not None and self.metrics is not None:
            self.metrics.count(batch)
        return out

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """(n, C) to (n, vocabulary)."""
        return self.bounded.logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Nothing to do: heedful's own loader, which refuses what does not fit, has read them."""
        return {name for name, _ in self.named_parameters()}

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        """A snapshot is a copy of the block."""
        return (get_temporal_copy_spec,)

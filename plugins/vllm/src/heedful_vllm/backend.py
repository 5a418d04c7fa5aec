"""What vLLM asks of an attention backend: here it only turns the engine's words for a batch into ours."""

from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

from heedful_vllm.batch import Batch, Piece


class BatchBuilder(AttentionMetadataBuilder[Batch]):
    """Reads what the engine says of a batch."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    reorder_batch_threshold: ClassVar[int | None] = None

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.mode, self.at = vllm_config.cache_config.mamba_cache_mode, device

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Batch:
        """The pieces of a batch."""
        common = common_attn_metadata
        table = mamba_get_block_table_tensor(
            common.block_table_tensor, common.seq_lens, self.kv_cache_spec, self.mode
        )
        blocks = table[:, 0].tolist()
        starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        pieces = []
        for i in range(common.num_reqs):
            n = starts[i + 1] - starts[i]
            if n > 0:
                pieces.append(Piece(starts[i], n, lengths[i] - n, blocks[i]))
        return Batch(pieces, self.at)


class BoundedBackend(AttentionBackend):
    """The name under which vLLM asks for the builder; attention itself is the model's."""

    @staticmethod
    def get_name() -> str:
        return "HEEDFUL"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("attention is the model's own")

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True

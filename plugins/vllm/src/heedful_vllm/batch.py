"""What a forward pass of the engine reads: which tokens are whose, and where their memories lie."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor


class Piece(NamedTuple):
    """Some tokens of one request."""

    start: int
    """The first of them in the batch."""
    length: int
    seen: int
    """Tokens that the request has had before."""
    block: int
    """Where its memory is."""


class Singles(NamedTuple):
    """The requests of a batch that decode: one token each, and memory of those before."""

    at: Tensor
    """(n,), their tokens in the batch."""
    blocks: Tensor
    """(n,), where their memories are."""
    seen: Tensor
    """(n,), tokens that each has had before."""


class Batch:
    """The requests of a forward pass.

    Args:
        pieces: of every request, in order.
        device: where the memory is.
    """

    def __init__(self, pieces: list[Piece], device: torch.device) -> None:
        self.pieces = pieces
        """All of them."""
        single = [piece for piece in pieces if piece.length == 1 and piece.seen > 0]
        self.longer = [piece for piece in pieces if piece.length > 1 or piece.seen == 0]
        """Those that read several tokens, or begin."""
        table = torch.tensor([(p.start, p.block, p.seen) for p in single], dtype=torch.long).view(-1, 3)
        self.singles = Singles(*table.T.contiguous().to(device))
        """The others."""


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

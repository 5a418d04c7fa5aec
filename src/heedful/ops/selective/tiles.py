"""The (T, S) plane of selective attention, cut into blocks of queries by all their keys."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.ops.masks import rank_in_segment
from heedful.ops.precision import wide_dtype

BLOCK = 128
LOG2_E = math.log2(math.e)  # tiles of logits, votes and F are in base 2: 2^x is faster than e^x
TILE = 2**18  # values of one tile of logits: 1 MB of float32 stay in the cache of a core


@dataclass(frozen=True)
class Block:
    """Queries start:stop, and the keys up to `end` that they may see."""

    start: int
    stop: int
    end: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Tiles:
    """The inputs in the precision of the sums, queries scaled to logits in base 2, and how they are cut."""

    q: Tensor  # (B, H, T, D), scaled
    k: Tensor  # (B, G, S, D)
    v: Tensor  # (B, G, S, E)
    select_q: Tensor  # (B, R, T, D'), scaled
    select_k: Tensor  # (B, R, S, D')
    selectors: int
    key_mask: Tensor | None
    segment_ids: Tensor | None
    first: Tensor | None  # (1 or B, S) bool, the first real token of each segment; None: it is key 0

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        select_q: Tensor | None,
        select_k: Tensor | None,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        scale: float,
        select_scale: float,
    ) -> "Tiles":
        dtype, first = wide_dtype(q), None
        if key_mask is not None or segment_ids is not None:
            first = rank_in_segment(k.shape[2], key_mask, segment_ids, q.device) == 0
        wide_q, wide_k = q.to(dtype) * (scale * LOG2_E), k.to(dtype).contiguous()
        return cls(
            wide_q,
            wide_k,
            v.to(dtype).contiguous(),
            wide_q[:, :1] if select_q is None else select_q.to(dtype) * (select_scale * LOG2_E),
            wide_k[:, :1] if select_k is None else select_k.to(dtype),
            1 if select_q is None else select_q.shape[1],
            key_mask,
            segment_ids,
            first,
        )

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def length(self) -> int:
        return self.q.shape[2]

    @property
    def n_keys(self) -> int:
        return self.k.shape[2]

    @property
    def n_blocks(self) -> int:
        return blocks_of(self.length)

    def blocks(self) -> list[Block]:
        """All blocks of queries, in order."""
        earlier = self.n_keys - self.length
        starts = range(0, self.length, BLOCK)
        stops = [min(start + BLOCK, self.length) for start in starts]
        return [Block(start, stop, earlier + stop) for start, stop in zip(starts, stops, strict=True)]

    def heads_of(self, block: Block) -> list[tuple[int, int]]:
        """Heads (from, to) that are taken at once: whole groups, or parts of one, as many as fill a tile."""
        heads, groups = self.q.shape[1], self.k.shape[1]
        fit = max(1, TILE // max(1, self.batch * (block.stop - block.start) * block.end))
        shared = heads // groups
        step = shared * max(1, fit // shared) if fit >= shared else 1
        return [(at, min(at + step, heads)) for at in range(0, heads, step)]

    def logits(self, block: Block, start: int, stop: int) -> Tensor:
        """Scaled logits of some heads, (B, h, n, end)."""
        return self.product(self.q[:, start:stop, block.rows], self.k, block, start, stop)

    def select_logits(self, block: Block) -> Tensor:
        """Scaled logits of the selection heads, (B, R, n, end)."""
        return self.select_q[:, :, block.rows] @ self.select_k[:, :, : block.end].transpose(-1, -2)

    def product(self, x: Tensor, keys: Tensor, block: Block, start: int, stop: int) -> Tensor:
        """X (B, h, n, D) times the transposed keys (B, G, S, D) of its heads: (B, h, n, end)."""
        own = self._own(keys, start, stop)[:, :, : block.end]
        return self._ungrouped(self._grouped(x, own) @ own.transpose(-1, -2), x)

    def times(self, weights: Tensor, values: Tensor, block: Block, start: int, stop: int) -> Tensor:
        """Weights (B, h, n, end) times the values (B, G, S, E) of their heads: (B, h, n, E)."""
        own = self._own(values, start, stop)[:, :, : block.end]
        return self._ungrouped(self._grouped(weights, own) @ own, weights)

    def add_transposed(
        self, total: Tensor, weights: Tensor, x: Tensor, block: Block, start: int, stop: int
    ) -> None:
        """Add weights^T x, summed over the heads of each group, to total (B, G, S, ·)."""
        own = self._own(total, start, stop)[:, :, : block.end]
        own += self._grouped(weights, own).transpose(-1, -2) @ self._grouped(x, own)

    def votes(self, block: Block, logits: Tensor) -> Tensor:
        """S of the selection heads, (B, R, n, end), from their logits."""
        votes = logits.relu()
        diagonal = votes[..., block.end - (block.stop - block.start) :]
        diagonal *= _strictly_lower(diagonal)
        if self.first is None:
            votes[..., 0] = 0
            return votes
        visible = self._visible(block)
        return votes.mul_((visible & ~self.first[:, None, : block.end])[:, None])

    def hide(self, block: Block, masks: Tensor) -> None:
        """Make F infinite where a key is not visible; rows that see nothing see everything, and are dropped."""
        diagonal = masks[..., block.end - (block.stop - block.start) :]
        later = torch.ones(diagonal.shape[-2:], dtype=torch.bool, device=masks.device).triu_(1)
        diagonal.masked_fill_(later, torch.inf)
        if self.first is not None:
            visible = self._visible(block)
            masks.masked_fill_(~visible[:, None], torch.inf)
            masks.masked_fill_(~visible.any(-1)[:, None, :, None], 0.0)

    def visible(self, block: Block, like: Tensor) -> Tensor:
        """Which keys each query sees, itself included, (1 or B, 1, n, end), as numbers of the dtype of `like`."""
        n = block.stop - block.start
        visible = torch.ones(n, block.end, dtype=torch.bool, device=like.device).tril_(block.end - n)
        seen = visible[None] if self.first is None else visible & self._visible(block)
        return seen[:, None].to(like.dtype)

    def subtract(self, logits: Tensor, masks: Tensor, start: int, stop: int) -> Tensor:
        """Logits - F, in place."""
        if self.selectors == 1:
            return logits.sub_(masks)
        return logits.sub_(masks[:, self._selector(start, stop)])

    def add_per_selector(self, total: Tensor, x: Tensor, start: int, stop: int) -> None:
        """Add x (B, h, n, end), summed over the heads that listen to each selection head, to total (B, R, ...)."""
        if self.selectors == 1:
            total += x.sum(1, keepdim=True)
        else:
            total.index_add_(1, self._selector(start, stop), x)

    def _selector(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.q.device) * self.selectors // self.q.shape[1]

    def _visible(self, block: Block) -> Tensor:
        """(B, n, end) bool: padding and segments, causality aside."""
        earlier = self.n_keys - self.length
        rows = slice(earlier + block.start, earlier + block.stop)
        visible = torch.ones(1, 1, 1, dtype=torch.bool, device=self.q.device)
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None, : block.end] & self.key_mask[:, rows, None]
        if self.segment_ids is not None:
            same = self.segment_ids[:, rows, None] == self.segment_ids[:, None, : block.end]
            visible = visible & same
        return visible

    def _own(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """The key heads (B, g, S, ·) that the query heads start:stop belong to."""
        shared = self.q.shape[1] // self.k.shape[1]
        return keys[:, start // shared : -(-stop // shared)]

    def _grouped(self, x: Tensor, own: Tensor) -> Tensor:
        """(B, h, n, ·) -> (B, g, h / g * n, ·): heads that share a key head become rows of one product."""
        return x if x.shape[1] == own.shape[1] else x.reshape(x.shape[0], own.shape[1], -1, x.shape[-1])

    def _ungrouped(self, product: Tensor, x: Tensor) -> Tensor:
        return product.view(x.shape[0], x.shape[1], x.shape[2], -1)


def blocks_of(length: int) -> int:
    """The number of blocks that `length` queries are cut into."""
    return -(-length // BLOCK)


def exp2_(logits: Tensor) -> Tensor:
    """2^x in place, 0 where it would not be a normal number: those slow products down a hundred times."""
    smallest = -126.0 if logits.dtype == torch.float32 else -1022.0
    return torch.threshold_(logits, smallest, -torch.inf).exp2_()


def _strictly_lower(like: Tensor) -> Tensor:
    n = like.shape[-1]
    return torch.ones(n, n, dtype=like.dtype, device=like.device).tril_(-1)


def exclusive_sum(x: Tensor, *, reverse: bool = False, part: int = 16) -> Tensor:
    """Sum over the rows before (or after) each row of (B, R, n, S), in two levels of triangular products.

    A cumsum along this axis is some ten times slower on a CPU.
    """
    n = x.shape[2]

    def triangle(size: int) -> Tensor:
        ones = torch.ones(size, size, dtype=x.dtype, device=x.device)
        return ones.triu_(1) if reverse else ones.tril_(-1)

    if n % part or n <= part:
        return triangle(n) @ x
    parts = x.unflatten(2, (n // part, part))  # (B, R, m, part, S)
    base = triangle(n // part) @ parts.sum(3)
    inside = triangle(part) @ parts
    return inside.add_(base[:, :, :, None]).flatten(2, 3)

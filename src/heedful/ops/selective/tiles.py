"""The (T, S) plane of selective attention, cut into tiles that stay in the cache of a core."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from heedful.ops.masks import rank_in_segment
from heedful.ops.precision import wide_dtype

BLOCK = 512  # queries of a block
WIDTH = 256  # keys of a tile of so many queries: the logits of one head are 512 kB of float32
TILE = BLOCK * WIDTH
TOGETHER = 2 * TILE  # logits of small tiles that are taken at once


class Tile(NamedTuple):
    """Queries start:stop by keys left:right, both counted from the first of all."""

    start: int
    stop: int
    left: int
    right: int
    diagonal: int
    """The last `diagonal` keys are the first as many queries' own: those see them in part."""

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.left, self.right)

    @property
    def n(self) -> int:
        """The number of queries."""
        return self.stop - self.start

    @property
    def width(self) -> int:
        """The number of keys."""
        return self.right - self.left


class Scratch:
    """Memory that serves from tile to tile: pages that are new to the process cost as much as the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._held: dict[str, Tensor] = {}
        self._triangles: dict[tuple[int, int], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor; what `name` was used for before is lost."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = self._like.new_empty(size)
        return held[:size].view(shape)

    def triangle(self, n: int, diagonal: int) -> Tensor:
        """(n, n), 1 up to the diagonal and 0 above."""
        triangle = self._triangles.get((n, diagonal))
        if triangle is None:
            ones = torch.ones(n, n, dtype=self._like.dtype, device=self._like.device)
            triangle = self._triangles[n, diagonal] = ones.tril_(diagonal)
        return triangle


@dataclass(frozen=True)
class Tiles:
    """The inputs in the precision of the sums, queries scaled, and how they are cut."""

    q: Tensor  # (B, H, T, D), scaled
    k: Tensor  # (B, G, S, D)
    v: Tensor  # (B, G, S, E)
    select_q: Tensor | None  # (B, R, T, D'), scaled; None: head 0
    select_k: Tensor | None  # (B, R, S, D')
    selectors: int  # 0: plain attention
    key_mask: Tensor | None
    segment_ids: Tensor | None
    first: Tensor | None  # (B, S) bool, the first real token of each segment; None: it is key 0
    scratch: Scratch

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
        selects: bool = True,
    ) -> "Tiles":
        dtype, first = wide_dtype(q), None
        if key_mask is not None or segment_ids is not None:
            first = rank_in_segment(k.shape[2], key_mask, segment_ids, q.device) == 0
            first = first.expand(q.shape[0], -1)
        wide = (q.to(dtype) * scale).contiguous()
        return cls(
            wide,
            k.to(dtype).contiguous(),
            v.to(dtype).contiguous(),
            None if select_q is None else select_q.to(dtype) * select_scale,
            None if select_k is None else select_k.to(dtype),
            0 if not selects else 1 if select_q is None else select_q.shape[1],
            key_mask,
            segment_ids,
            first,
            Scratch(wide),
        )

    @cached_property
    def planes(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (B * G, S, ·)."""
        return self.k.flatten(0, 1), self.v.flatten(0, 1)

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def groups(self) -> int:
        return self.k.shape[1]

    @property
    def length(self) -> int:
        return self.q.shape[2]

    @property
    def n_keys(self) -> int:
        return self.k.shape[2]

    def parts(self) -> Iterator[tuple[slice, "Tiles"]]:
        """The rows of the batch one at a time, or several where that is little work."""
        size = self.heads * self.length * self.n_keys
        step = max(1, TOGETHER // max(1, size)) if self.length <= min(WIDTH, BLOCK) else 1
        for at in range(0, self.batch, step):
            part = slice(at, at + step)
            yield (
                part,
                replace(
                    self,
                    q=self.q[part],
                    k=self.k[part],
                    v=self.v[part],
                    select_q=None if self.select_q is None else self.select_q[part],
                    select_k=None if self.select_k is None else self.select_k[part],
                    key_mask=None if self.key_mask is None else self.key_mask[part],
                    segment_ids=None if self.segment_ids is None else self.segment_ids[part],
                    first=None if self.first is None else self.first[part],
                ),
            )

    def blocks(self) -> list[list[Tile]]:
        """The tiles of each block of queries, in order; a tile begins with the first query that sees its keys."""
        earlier, blocks = self.n_keys - self.length, []
        for start in range(0, self.length, BLOCK):
            stop = min(start + BLOCK, self.length)
            end, n = earlier + stop, stop - start
            if self.batch > 1:  # by `parts` all of it fits one tile
                step = end
            elif earlier + start:
                step = max(WIDTH, TILE // n)
            else:  # beside the diagonal half of a tile is for nothing: where there is little else, narrow ones
                step = WIDTH if n > WIDTH else -(-WIDTH // 2)
            tiles = []
            for left in range(0, end, step):
                first, right = max(start, left - earlier), min(left + step, end)
                tiles.append(Tile(first, stop, left, right, max(0, right - earlier - first)))
            blocks.append(tiles)
        return blocks

    def with_keys(self, rows: slice, keys: Tensor) -> "Tiles":
        """Some queries with some keys: indices (S',) in order, the last ones the queries' own."""

        def chosen(x: Tensor | None, dim: int) -> Tensor | None:
            return None if x is None else x.index_select(dim, keys)

        return replace(
            self,
            q=self.q[:, :, rows],
            k=self.k.index_select(2, keys),
            v=self.v.index_select(2, keys),
            select_q=None if self.select_q is None else self.select_q[:, :, rows],
            select_k=chosen(self.select_k, 2),
            key_mask=chosen(self.key_mask, 1),
            segment_ids=chosen(self.segment_ids, 1),
            first=chosen(self.first, 1),
        )

    def small(self, rows: slice) -> bool:
        """Whether copying the keys of a block of queries costs about as much as the block."""
        return self.batch > 1 or rows.stop - rows.start < BLOCK // 8

    def strips(self, n_keys: int) -> list[Tile]:
        """All queries by the first keys, which all of them see."""
        n, step = self.length, max(WIDTH, TILE // self.length)
        return [Tile(0, n, left, min(left + step, n_keys), 0) for left in range(0, n_keys, step)]

    def units(self, tiles: list[Tile]) -> list["Unit"]:
        """The heads one at a time, or several where tiles are small."""
        if self.batch > 1:  # by `parts` all of it fits
            return [Unit(slice(0, self.heads), slice(0, self.batch * self.groups), self.batch)]
        shared, size = self.heads // self.groups, tiles[0].n * tiles[0].width
        fit = TOGETHER // size if 2 * size <= TILE else 1
        if fit < 2 * shared or (shared > 1 and len(tiles) > 1):
            return [Unit(slice(h, h + 1), h // shared, 1) for h in range(self.heads)]
        step = fit // shared
        ends = [(g, min(g + step, self.groups)) for g in range(0, self.groups, step)]
        return [Unit(slice(g * shared, to * shared), slice(g, to), 1) for g, to in ends]

    def product(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The flat product x y^T, in the scratch memory `name`."""
        return torch.matmul(x, y.mT, out=self.scratch(name, *x.shape[:-1], y.shape[-2]))

    def select_logits(self, tile: Tile) -> Tensor:
        """Scaled logits of selection heads of their own, (B, R, n, w)."""
        assert self.select_q is not None and self.select_k is not None
        return self.select_q[:, :, tile.rows] @ self.select_k[:, :, tile.keys].transpose(-1, -2)

    def votes(self, tile: Tile, logits: Tensor) -> Tensor:
        """S of the selection heads, (B, R, n, w), from their logits."""
        votes = torch.clamp(logits, min=0, out=self.scratch("votes", *logits.shape))
        if tile.diagonal:
            votes[..., : tile.diagonal, -tile.diagonal :].mul_(self.scratch.triangle(tile.diagonal, -1))
        if self.first is not None:
            votes.mul_((self._visible(tile) & ~self.first[:, None, tile.keys])[:, None])
        elif tile.left == 0:
            votes[..., 0] = 0
        return votes

    def soft_masks(self, votes: Tensor, carry: Tensor, tile: Tile) -> Tensor:
        """F before each query, (B, R, n, w): the carry (B, R, S) and the votes of the queries before."""
        out = self.scratch("masks", *votes.shape)
        return exclusive_sum(votes, carry[..., tile.keys], out=out)

    def hide(self, tile: Tile, weights: Tensor) -> None:
        """Make the weights of keys that are not visible 0."""
        if self.first is not None:
            weights.mul_(self.visible(tile, weights))
        elif tile.diagonal:
            weights[..., : tile.diagonal, -tile.diagonal :].mul_(self.scratch.triangle(tile.diagonal, 0))

    def block_out(self, tile: Tile, logits: Tensor) -> None:
        """Make the logits of keys that are not visible -inf."""
        if self.first is not None:
            logits.masked_fill_(self.visible(tile, logits) == 0, -torch.inf)
        elif tile.diagonal:
            later = self.scratch.triangle(tile.diagonal, 0) == 0
            logits[..., : tile.diagonal, -tile.diagonal :].masked_fill_(later, -torch.inf)

    def visible(self, tile: Tile, like: Tensor) -> Tensor:
        """Which keys each query sees, itself included, (1 or B, 1, n, w), as numbers of the dtype of `like`."""
        visible = torch.ones(1, tile.n, tile.width, dtype=torch.bool, device=like.device)
        if tile.diagonal:
            visible.tril_(tile.width - tile.diagonal)
        if self.first is not None:
            visible = visible & self._visible(tile)
        return visible[:, None].to(like.dtype)

    def heard(self, masks: Tensor, heads: slice) -> Tensor:
        """Of masks (B, R, ...) those that each of some heads listens to: (B, 1 or h, ...)."""
        return masks if self.selectors == 1 else masks[:, self._selector(heads)]

    def add_heard(self, total: Tensor, x: Tensor, heads: slice) -> None:
        """Add x (B, h, n, w), summed over the heads that listen to each selection head, to total (B, R, ...)."""
        if self.selectors != 1:
            total.index_add_(1, self._selector(heads), x)
        else:
            total += x if x.shape[1] == 1 else x.sum(1, keepdim=True)

    def _selector(self, heads: slice) -> Tensor:
        return torch.arange(heads.start, heads.stop, device=self.q.device) * self.selectors // self.heads

    def _visible(self, tile: Tile) -> Tensor:
        """(B, n, w) bool: padding and segments, causality aside."""
        earlier = self.n_keys - self.length
        rows = slice(earlier + tile.start, earlier + tile.stop)
        visible = torch.ones(1, 1, 1, dtype=torch.bool, device=self.q.device)
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None, tile.keys] & self.key_mask[:, rows, None]
        if self.segment_ids is not None:
            same = self.segment_ids[:, rows, None] == self.segment_ids[:, None, tile.keys]
            visible = visible & same
        return visible


class Unit(NamedTuple):
    """Heads that are taken at once: some key heads with all heads that share them, or a single head."""

    heads: slice
    planes: slice | int
    """The key heads, counted over the rows of the batch."""
    batch: int

    def flat(self, x: Tensor) -> Tensor:
        """(B, h, n, ·) -> (planes, rows, ·), or (rows, ·): heads that share keys become rows of one product."""
        if isinstance(self.planes, int):
            return x.reshape(-1, x.shape[-1])
        return x.reshape(self.planes.stop - self.planes.start, -1, x.shape[-1])


def add_product(total: Tensor, x: Tensor, y: Tensor, *, fresh: bool = False) -> None:
    """Add `x y` to the total, or put it there.

    Args:
        total: (m, n), or (planes, m, n).
        x: (m, d), or (planes, m, d).
        y: (d, n), or (planes, d, n).
        fresh: whether to overwrite what is in `total`.
    """
    add = total.baddbmm_ if x.ndim == 3 else total.addmm_
    add(x, y, beta=0 if fresh else 1)


def blocks_of(length: int) -> int:
    """The number of blocks that `length` queries are cut into."""
    return -(-length // BLOCK)


def exclusive_sum(
    x: Tensor, start: Tensor, *, reverse: bool = False, part: int = 16, out: Tensor | None = None
) -> Tensor:
    """`start` plus the sum over the rows before (or after) each row of (B, R, n, w).

    In two levels of triangular products: a cumsum along this axis is some ten times slower on a CPU.

    Args:
        x: (B, R, n, w).
        start: (B, R, w).
        reverse: sum the rows after each row.
        part: rows of the lower level.
        out: where to put it, contiguous, not x.
    """
    n, width = x.shape[2:]
    out = torch.empty_like(x) if out is None else out
    rest = n % part
    if rest and n > part:
        whole, ends = slice(0, n - rest), slice(n - rest, n)
        first, second = (ends, whole) if reverse else (whole, ends)
        middle = start + x[:, :, first].sum(2)
        for rows, base in ((first, start), (second, middle)):
            out[:, :, rows] = exclusive_sum(x[:, :, rows], base, reverse=reverse, part=part)
        return out

    def triangle(size: int) -> Tensor:
        ones = torch.ones(size, size, dtype=x.dtype, device=x.device)
        return ones.triu_(1) if reverse else ones.tril_(-1)

    planes, base = x.reshape(-1, n, width), start.reshape(-1, 1, width)
    if n > part:
        planes = planes.reshape(-1, part, width)
        sums = planes.sum(1).view(-1, n // part, width)
        base = torch.baddbmm(base, triangle(n // part).expand(len(sums), -1, -1), sums).view(-1, 1, width)
    inside = triangle(planes.shape[1]).expand(len(planes), -1, -1)
    torch.baddbmm(base, inside, planes, out=out.view(planes.shape))
    return out

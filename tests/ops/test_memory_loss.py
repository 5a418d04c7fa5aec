"""unmasked_count and memory_share against loops over Python floats, written from the definition."""

import math
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful.ops import memory_share, unmasked_count


@dataclass(frozen=True)
class Row:
    """One row of a batch, as lists: queries, keys, which tokens are real, the document of each."""

    q: list[list[float]]
    k: list[list[float]]
    real: list[bool]
    document: list[int]


def counts_of(row: Row, tau: float) -> list[float]:
    """`M_i = sum_{k<=i} 1 - min(F[i,k], tau) / tau`, over the real tokens of the query's document."""
    n = len(row.q)
    scale = 1 / math.sqrt(len(row.q[0]))
    first: dict[int, int] = {}
    for i in range(n):
        if row.real[i]:
            first.setdefault(row.document[i], i)
    soft_mask = [0.0] * n
    counts = []
    for i in range(n):
        if not row.real[i]:
            counts.append(0.0)
            continue
        mine = [j for j in range(i + 1) if row.real[j] and row.document[j] == row.document[i]]
        counts.append(sum(1 - min(soft_mask[j], tau) / tau for j in mine))
        for j in mine:  # votes count for later queries only
            logit = scale * sum(a * b for a, b in zip(row.q[i], row.k[j], strict=True))
            if j not in (i, first[row.document[i]]):
                soft_mask[j] += max(logit, 0.0)
    return counts


def share_of(row: Row, counts: list[float]) -> float:
    """Each document's own maximum over its length, and the mean of those, by length."""
    total, tokens = 0.0, 0
    for document in set(row.document):
        inside = [i for i in range(len(counts)) if row.document[i] == document and row.real[i]]
        if inside:
            peak = max(counts[i] for i in inside)
            total += peak / len(inside) * len(inside)
            tokens += len(inside)
    return total / tokens if tokens else 0.0


@st.composite
def batches(draw) -> tuple[list[Row], dict[str, Tensor], float]:
    choose = random.Random(draw(st.integers(0, 10**6)))
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    padded, packed = draw(st.booleans()), draw(st.booleans())
    made = []
    for _ in range(rows):
        q, k = ([[choose.gauss(0, 1.3) for _ in range(3)] for _ in range(length)] for _ in range(2))
        real = [not padded or choose.random() < 0.7 for _ in range(length)]
        ids = [choose.choice([5, 2, 9]) for _ in range(length)] if packed else [0] * length
        if choose.random() < 0.5:
            ids.sort()  # neighbours, as packing makes them; else mixed
        made.append(Row(q, k, real, ids))
    masks: dict[str, Tensor] = {}
    if padded:
        masks["key_mask"] = torch.tensor([row.real for row in made])
    if packed:
        masks["segment_ids"] = torch.tensor([row.document for row in made])
    return made, masks, draw(st.sampled_from([0.3, 1.0, 4.0]))


@given(batches())
@settings(max_examples=80)
def test_counts_and_shares_equal_the_definition(batch: tuple[list[Row], dict[str, Tensor], float]):
    rows, masks, tau = batch
    q, k = (torch.tensor([getattr(row, n) for row in rows], dtype=torch.float64)[:, None] for n in "qk")
    counts = unmasked_count(q, k, tau=tau, **masks)
    expected = [counts_of(row, tau) for row in rows]
    torch.testing.assert_close(counts[:, 0], torch.tensor(expected, dtype=torch.float64))
    share = memory_share(counts, **masks)
    shares = [share_of(row, own) for row, own in zip(rows, expected, strict=True)]
    torch.testing.assert_close(share[:, 0], torch.tensor(shares, dtype=torch.float64))
    assert ((share >= 0) & (share <= 1 + 1e-12)).all()


def test_without_votes_the_share_is_the_whole_row():
    q, k = torch.zeros(2, 1, 7, 4), torch.ones(2, 1, 7, 4)
    counts = unmasked_count(q, k)
    assert counts[0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert memory_share(counts).tolist() == [[1.0], [1.0]]
    mask = torch.tensor([[True] * 7, [False] * 5 + [True] * 2])
    assert memory_share(unmasked_count(q, k, key_mask=mask), key_mask=mask).tolist() == [[1.0], [1.0]]
    nothing = torch.zeros(2, 7, dtype=torch.bool)
    assert memory_share(unmasked_count(q, k, key_mask=nothing), key_mask=nothing).tolist() == [[0.0], [0.0]]


def test_documents_count_by_their_length():
    """A packed row is the mean of its documents, each read alone, by length; in whatever order ids come."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 12, 4, dtype=torch.float64)
    lengths, ids = [3, 7, 2], [4, 1, 4000]
    segments = torch.tensor([[i for i, n in zip(ids, lengths, strict=True) for _ in range(n)]])
    packed = memory_share(unmasked_count(q, k, segment_ids=segments), segment_ids=segments)
    parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), strict=True)
    alone = [memory_share(unmasked_count(*part)) for part in parts]
    expected = sum(n * share for n, share in zip(lengths, alone, strict=True)) / 12
    torch.testing.assert_close(packed, expected)
    scattered = segments[:, torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    assert memory_share(torch.ones(1, 1, 12), segment_ids=scattered).item() == pytest.approx(3 / 12)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_gradients(packed: bool):
    """Through F, the maximum and the clamp, to the queries and the keys of the selection heads."""
    torch.manual_seed(3)
    q, k = 0.4 * torch.randn(2, 2, 2, 10, 3, dtype=torch.float64)
    masks = {"key_mask": torch.arange(10) >= torch.tensor([[0], [2]])}
    if packed:
        masks["segment_ids"] = torch.tensor([[0] * 5 + [1] * 5, [0] * 8 + [1] * 2])

    def share(q: Tensor, k: Tensor) -> Tensor:
        return memory_share(unmasked_count(q, k, tau=2.0, **masks), **masks)

    torch.autograd.gradcheck(share, (q.requires_grad_(), k.requires_grad_()))
    q_grad, k_grad = torch.autograd.grad(share(q, k).sum(), (q, k))
    assert q_grad.abs().max() > 1e-3
    assert k_grad.abs().max() > 1e-3
    assert not q_grad[1, :, :2].any()  # padding
    assert not k_grad[1, :, :2].any()


def test_what_is_gone_has_no_gradient():
    """Beyond tau a token counts nothing, and pushes nobody any further."""
    q = torch.full((1, 1, 5, 2), 4.0, dtype=torch.float64, requires_grad=True)
    k = torch.full((1, 1, 5, 2), 4.0, dtype=torch.float64, requires_grad=True)
    counts = unmasked_count(q, k)
    assert counts.flatten().tolist() == [1, 2, 2 + 1, 3, 3]  # from query 2 on: the first, the last two
    counts[0, 0, 4].backward()
    assert not k.grad[0, 0, 1:3].any()


def test_several_selection_heads():
    torch.manual_seed(1)
    q, k = torch.randn(2, 2, 3, 6, 4, dtype=torch.float64)
    counts = unmasked_count(q, k)
    assert memory_share(counts).shape == (2, 3)
    for head in range(3):
        own = memory_share(unmasked_count(q[:, head : head + 1], k[:, head : head + 1]))
        torch.testing.assert_close(memory_share(counts)[:, head : head + 1], own)


@pytest.mark.parametrize("masked", [False, True])
def test_counts_over_several_blocks(masked: bool, monkeypatch: pytest.MonkeyPatch):
    """Blocks of five queries, earlier votes and two selection heads: counts and gradients of the formula."""
    from heedful.ops.masks import rank_in_segment, visible_keys, voted_keys
    from heedful.ops.selective import tiles
    from heedful.ops.selective.reference import soft_masks

    monkeypatch.setattr(tiles, "BLOCK", 5)
    torch.manual_seed(0)
    q = torch.randn(2, 2, 18, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 2, 23, 4, dtype=torch.float64, requires_grad=True)
    earlier = torch.rand(2, 2, 5, dtype=torch.float64, requires_grad=True)
    key_mask = segment_ids = None
    if masked:
        key_mask, segment_ids = torch.rand(2, 23) > 0.2, torch.randint(0, 2, (2, 23))
    visible = visible_keys(18, 23, key_mask, segment_ids, q.device)
    voted = voted_keys(visible, rank_in_segment(23, key_mask, segment_ids, q.device))
    masks = soft_masks(q @ k.transpose(-1, -2) / 2, earlier, voted)[:, :, :-1]
    expected = torch.where(visible[:, None], 1 - masks.clamp(max=1.5) / 1.5, 0.0).sum(-1)
    counts = unmasked_count(q, k, tau=1.5, soft_mask=earlier, key_mask=key_mask, segment_ids=segment_ids)
    torch.testing.assert_close(counts, expected)
    gradient = torch.randn_like(expected)
    leaves = (q, k, earlier)
    for got, want in zip(
        torch.autograd.grad(counts, leaves, gradient),
        torch.autograd.grad(expected, leaves, gradient),
        strict=True,
    ):
        torch.testing.assert_close(got, want)

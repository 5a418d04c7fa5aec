"""A decoding step of many sequences in one store: what each gets alone, and only its own row is touched."""

import pytest
import torch

from heedful.ops.selective.rows import RowStore, step_rows
from heedful.ops.selective.slots import attend_slots


def store_of(n_rows: int, groups: int, slots: int, size: int, own: int, dtype: torch.dtype) -> RowStore:
    """In a buffer of bytes, with something else between the rows."""
    torch.manual_seed(0)
    positions = torch.arange(slots).repeat(n_rows, 1)
    given = [torch.randn(n_rows, groups, slots, size, dtype=dtype) for _ in range(2)]
    given += [torch.rand(n_rows, slots, dtype=torch.promote_types(dtype, torch.float32)), positions]
    given += [torch.zeros(n_rows, dtype=torch.long), torch.rand(n_rows, 1, slots, max(own, 1), dtype=dtype)]
    given[2][:, 0] = 0
    pages, placed, end = torch.zeros(n_rows, 100_000, dtype=torch.uint8), [], 0
    for tensor in given:
        n = tensor[0].numel() * tensor.element_size()
        placed.append(pages[:, end : end + n].view(tensor.dtype).unflatten(1, tensor.shape[1:] or (1,)))
        placed[-1].copy_(tensor.view(placed[-1].shape))
        end += -(-n // 64) * 64
    return RowStore(*placed[:4], placed[4][:, 0], placed[5] if own else None)


@pytest.mark.parametrize("own", [0, 1, 5], ids=lambda n: f"select_dim={n}")
@pytest.mark.parametrize(
    ("dtype", "grad"),
    [(torch.float32, False), (torch.float32, True), (torch.float64, False), (torch.bfloat16, False)],
    ids=["C++", "float32", "float64", "bf16"],
)
def test_as_one_after_another(dtype: torch.dtype, grad: bool, own: int):
    n_rows, groups, slots, size = 6, 2, 33, 24
    store = store_of(n_rows, groups, slots, size, own, dtype)
    alone = store_of(n_rows, groups, slots, size, own, dtype)
    rows, seen = torch.tensor([4, 0, 2, 5]), torch.tensor([32, 7, 20, 400])
    for held in (store, alone):
        held.next[rows] = torch.tensor([32, 7, 20, 3])
    torch.manual_seed(1)
    for _ in range(3):
        q, k, v = (torch.randn(4, *s, dtype=dtype) for s in ((4, 1, size), (groups, size), (groups, size)))
        select = (torch.randn(4, 1, 1, own, dtype=dtype), torch.randn(4, own, dtype=dtype)) if own else None
        own_votes = torch.rand(4, 2, dtype=store.soft_mask.dtype)[:, 0] if own else None
        how = {"scale": 0.3, "grace": 2, "first": 2, "subtract": own != 1}
        with torch.set_grad_enabled(grad):
            out = step_rows(store, rows, seen, q, k, v, select=select, own_votes=own_votes, **how)
        for b, row in enumerate(rows.tolist()):
            slot, n = int(alone.next[row]), min(int(seen[b]) + 1, slots)
            alone.k[row, :, slot], alone.v[row, :, slot] = k[b], v[b]
            alone.soft_mask[row, slot] = 0 if own_votes is None else own_votes[b]
            alone.positions[row, slot] = seen[b]
            chosen = None
            if select is not None and alone.select_k is not None:
                alone.select_k[row, 0, slot] = select[1][b]
                chosen = select[0][b : b + 1], alone.select_k[row : row + 1, :, :n]
            held = (alone.k, alone.v), (alone.soft_mask, alone.positions)
            expected, following = attend_slots(
                q[b : b + 1],
                *(x[row : row + 1, :, :n] for x in held[0]),
                *(x[row : row + 1, :n] for x in held[1]),
                torch.tensor([[slot]]),
                select=chosen,
                **how,
            )
            alone.next[row] = n if n < slots else following[0, 0]
            assert torch.equal(out[b], expected[0])
        for mine, theirs in zip(store, alone, strict=True):
            assert mine is None or torch.equal(mine, theirs)
        seen = seen + 1

"""Products through either library, and the trial that chooses between them."""

import pytest
import torch
from torch import Tensor

from heedful.ops import gemm


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("planes", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_float64(
    onednn: bool, planes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: onednn)
    torch.manual_seed(0)
    x, y, z = (torch.randn(*planes, *shape, dtype=dtype) for shape in ((37, 20), (50, 20), (20, 11)))

    def close(got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)

    out = torch.full((*planes, 37, 50), torch.nan, dtype=dtype)
    close(gemm.product(x, y, out), x.double() @ y.double().mT)
    close(
        gemm.product(x[..., 3:, :], y[..., 2:9, :], out[..., 3:, :7].clone()),
        x.double()[..., 3:, :] @ y.double()[..., 2:9, :].mT,
    )
    total = torch.full((*planes, 37, 11), torch.nan, dtype=dtype)
    gemm.add_product(total, x, z, fresh=True)
    gemm.add_product(total, x, z)
    gemm.add_product(total, x.mT.contiguous().mT, z.mT.contiguous().mT)
    close(total, 3 * (x.double() @ z.double()))


def test_the_trial_rejects_wrong_slow_and_missing_routines(monkeypatch: pytest.MonkeyPatch):
    def trial(routine: object) -> bool:
        monkeypatch.setattr(gemm, "_onednn", routine)
        return gemm.onednn_is_faster.__wrapped__()

    def missing(x: Tensor, y: Tensor) -> Tensor:
        raise AttributeError("no such operator")

    def slow(x: Tensor, y: Tensor) -> Tensor:
        return [x @ y.t() for _ in range(5)][-1]

    answer: dict[str, Tensor] = {}

    def fast(x: Tensor, y: Tensor) -> Tensor:
        if "it" not in answer:
            answer["it"] = x @ y.t()
        return answer["it"]

    assert trial(fast)
    assert not trial(lambda x, y: fast(x, y) + 1e-2)
    assert not trial(lambda x, y: fast(x, y)[:5])
    assert not trial(missing)
    assert not trial(slow)

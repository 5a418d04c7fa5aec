"""The rule behind `impl="auto"`, and that it is obeyed."""

from types import SimpleNamespace

import pytest
import torch

from heedful.ops.selective import api, selective_attention
from heedful.ops.selective.auto_rule import SHORT, choose
from heedful.ops.selective.triton import available

LONG = 1 + int(SHORT**0.5)


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
@pytest.mark.parametrize("length", [2, 64, 4096])
def test_off_the_cpu_it_is_sdpa_but_where_the_kernels_run(device: str, length: int) -> None:
    assert choose(device, length, length) == "sdpa"
    assert choose(device, length, length, True) == ("triton" if device == "cuda" else "sdpa")


def test_kernels_are_trusted_with_what_agreed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusts(dtype: torch.dtype, *sizes: int, device: str = "cpu") -> bool:
        """Of q, v and, if given, select_q."""
        heads = [SimpleNamespace(shape=(1, 1, 1, n), dtype=dtype, device=torch.device(device)) for n in sizes]
        return available.trusted(*heads)

    monkeypatch.setattr(available, "unavailable", lambda *heads: None)
    assert trusts(torch.bfloat16, 96, 64) and trusts(torch.float16, 64, 64, 64)
    assert trusts(torch.float32, 41, 7)
    assert not trusts(torch.bfloat16, 32, 32) and not trusts(torch.bfloat16, 64, 128)
    assert not trusts(torch.float16, 64, 96) and not trusts(torch.float16, 64, 64, 32)
    assert not trusts(torch.bfloat16, 96, 64, 96)
    for capability, same in (((9, 0), True), ((8, 0), False)):
        monkeypatch.setattr(available, "_capability", lambda index, it=capability: it)
        assert trusts(torch.bfloat16, 64, 64, device="cuda:1") is same
    monkeypatch.setattr(available, "unavailable", lambda *heads: "no Triton")
    assert not trusts(torch.float32, 64, 64)


def test_on_the_cpu_the_number_of_logits_decides() -> None:
    assert choose("cpu", 2, SHORT // 2) == "sdpa"
    assert choose("cpu", 2, SHORT // 2 + 1) == "blocked"
    assert choose("cpu", 4096, 4096) == "blocked"


def test_choosing_compiles() -> None:
    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if choose(x.device.type, x.shape[0], x.shape[0]) == "sdpa" else 2)

    assert [float(step(torch.zeros(n))[0]) for n in (8, LONG - 1, LONG, 2000)] == [1, 1, 2, 2]


@pytest.mark.parametrize(("length", "expected"), [(1, "one_query"), (8, "sdpa"), (LONG, "blocked")])
def test_auto_obeys(monkeypatch: pytest.MonkeyPatch, length: int, expected: str) -> None:
    q, k, v = torch.randn(3, 1, 2, length, 4).unbind(0)
    ran: list[str] = []

    def spy(name: str, run):
        return lambda *args: ran.append(name) or run(*args)

    for names in (api.BLOCKED, api.DENSE):
        for name, run in names.items():
            monkeypatch.setitem(names, name, spy(name, run))
    monkeypatch.setattr(api, "selective_one_query", spy("one_query", api.selective_one_query))
    monkeypatch.setattr(api, "native_is_preferred", lambda *_: False)
    selective_attention(q, k, v)
    assert ran == [expected]

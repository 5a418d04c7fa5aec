"""The baseline computes what SASCore computes, so that their times may be compared."""

import json

import pytest
import sas
import torch
from published_sas import PublishedSAS

from heedful.attention import SASCore
from heedful.bench.kernels import Sizes


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_published_module_equals_the_core(width: int, dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    published = PublishedSAS(4, 12, 8, 12, width).to(dtype)
    core = SASCore(4, 12, 8, 12, width).to(dtype)
    core.load_published_state_dict(published.state_dict())
    tokens = [torch.randn(2, 67, 4, 8, dtype=dtype) for _ in range(3)]
    weight, found = torch.randn(2, 67, 32, dtype=dtype), []
    for module in (published, core):
        inputs = [x.clone().requires_grad_() for x in tokens]
        out = module(*inputs)
        (out * weight).sum().backward()
        found.append([out.detach(), *(x.grad for x in inputs)])
    # A module of the same layout takes the gradients by their published names.
    gradients = SASCore(4, 12, 8, 12, width).to(dtype)
    gradients.load_published_state_dict({name: p.grad for name, p in published.named_parameters()})
    found[0] += [p.detach() for p in gradients.parameters()]
    found[1] += [p.grad for p in core.parameters()]
    for theirs, ours in zip(*found, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def test_it_is_what_sas_is_measured_against(monkeypatch: pytest.MonkeyPatch):
    sizes = Sizes(2, 2, 8, 8)
    workload = sas.sas_workload("train", 16, sizes, torch.device("cpu"), torch.float32)
    assert [case.name for case in workload.cases] == [sas.PUBLISHED, sas.OURS]
    a, b = (case.run() for case in workload.cases)
    assert len(a) == len(b) > 3
    monkeypatch.setattr(SASCore, "load_published_state_dict", lambda self, state_dict: None)
    with pytest.raises(AssertionError):
        sas.sas_workload("train", 16, sizes, torch.device("cpu"), torch.float32)


def test_the_script_leaves_figures(tmp_path, capfd):
    sas.main(["--lengths", "16", "--heads", "2", "--head-dim", "8", "--turns", "2", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "sas.jsonl").read_text().splitlines()]
    assert [(row["workload"], row["case"]) for row in rows] == [
        (work, case) for work in ("SAS prefill", "SAS train") for case in (sas.PUBLISHED, sas.OURS)
    ]
    assert all(row["command"].startswith("python benchmarks/sas.py --lengths 16") for row in rows)
    assert "vs publ." in capfd.readouterr().out
    assert (tmp_path / "sas.txt").exists()

"""SAS against the published module, with the same weights: forward, and forward and backward.

    python benchmarks/sas.py --threads 1,2 --out results/sas

SAS has 3x heads and 1.5x features. Writes sas.jsonl and sas.txt; `benchmarks/goals.py results/sas` judges them.
"""

import argparse
import sys

import torch
from published_sas import PublishedSAS

from heedful.attention.sas import SASCore
from heedful.bench.kernels import Sizes, Work, read, trained
from heedful.bench.workload import Case, Workload
from heedful.cli.bench.common import DTYPES, Report, numbers, run_ceilings, run_workload, thread_counts

PUBLISHED, OURS = "SAS, published", "SAS, heedful"
KERNEL_SIZE = 5  # W


def sas_workload(work: Work, length: int, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Workload:
    """SAS with 3x heads and 1.5x features, the published module against ours with its weights.

    Raises:
        AssertionError: if they compute different things.
    """
    heads, size = sizes.n_heads, sizes.head_dim
    wide, wide_size = 3 * heads, size * 3 // 2
    torch.manual_seed(0)
    published = PublishedSAS(heads, wide, size, wide_size, KERNEL_SIZE).to(device, dtype)
    own = SASCore(heads, wide, size, wide_size, KERNEL_SIZE).to(device, dtype)
    own.load_published_state_dict(published.state_dict())
    with torch.no_grad():
        x = [torch.randn(1, 67, heads, size, device=device, dtype=dtype) for _ in range(3)]
        torch.testing.assert_close(own(*x), published(*x), rtol=0, atol=1e-4 if dtype.itemsize >= 4 else 5e-2)
    q, k, v = (torch.randn(sizes.batch, length, heads, size, device=device, dtype=dtype) for _ in range(3))
    if work == "train":
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    per_token = 2 * (
        3 * KERNEL_SIZE * size * wide * (heads + wide) + 2 * wide * wide_size * (size + wide_size)
    )
    per_token += 2 * (heads * size) ** 2
    attention = Sizes(wide, wide, wide_size, size, sizes.batch)
    flops = sizes.batch * length * per_token * (3 if work == "train" else 1) + attention.flops(length, work)
    moved = Sizes(heads, heads, size, size, sizes.batch).bytes(length, work, dtype)
    cases = []
    for name, module in ((PUBLISHED, published), (OURS, own)):
        extra = list(module.parameters())
        run = trained(module, q, k, v, extra) if work == "train" else read(module, q, k, v)
        cases.append(Case(name, run, flops, moved))
    return Workload(
        name=f"SAS {work}",
        length=length,
        tokens=sizes.batch * length,
        cases=cases,
        baselines={"vs publ.": PUBLISHED},
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="2048", help="T, separated by commas")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", default="1", help='separated by commas; "all": every core')
    parser.add_argument("--seconds", type=float, default=10.0, help="for the cases of a table together")
    parser.add_argument("--turns", type=int, default=None)
    parser.add_argument("--out", default="runs/bench/sas")
    values = vars(parser.parse_args(arguments)) | {"memory": True}
    device, dtype = torch.device(values["device"]), DTYPES[values["dtype"]]
    sizes = Sizes(values["heads"], values["heads"], values["head_dim"], values["head_dim"])
    settings = {name: values[name] for name in ("heads", "head_dim", "dtype", "device")}
    settings |= {"kv_heads": sizes.n_kv_heads, "value_dim": sizes.value_dim, "batch": sizes.batch}
    given = sys.argv[1:] if arguments is None else arguments
    report = Report("sas", values["out"], given, device, settings, ["python", "benchmarks/sas.py"])
    with report.interruptible():
        report.start()
        for count in thread_counts(values["threads"], device):
            torch.set_num_threads(count)
            ceilings = run_ceilings(report, dtype, count)
            for length in numbers("lengths", values["lengths"], least=2):
                works: tuple[Work, ...] = ("prefill", "train")
                for work in works:
                    run_workload(
                        report, sas_workload(work, length, sizes, device, dtype), ceilings, count, values
                    )
        report.finish()


if __name__ == "__main__":
    main()

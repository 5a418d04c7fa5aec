"""Does the process grow while a bounded cache generates? 20,000 tokens with 64 kept per layer.

    python benchmarks/long_generation.py              # about two minutes

Prints the resident memory of the process along the way, and writes results/long-generation/memory.jsonl. Exits
with 1 if it grows by 20 MB or more from step 100 on.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from heedful.hf import HeedfulCache, HeedfulConfig, HeedfulForCausalLM

LIMIT_MB = 20


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class Watch(StoppingCriteria):
    """Notes memory after every `every` tokens; never stops anything."""

    def __init__(self, cache: HeedfulCache, every: int) -> None:
        self.cache, self.every, self.step, self.rows = cache, every, 0, []
        self.started = time.perf_counter()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Called by generate after every token."""
        self.step += 1
        assert max(self.cache.memories[0].positions.shape[1:]) == self.cache.memories[0].n_slots
        if self.step == 100 or self.step % self.every == 0:
            row = {
                "step": self.step,
                "resident_mb": round(resident_mb(), 2),
                "cache_bytes": self.cache.nbytes,
            }
            row |= {"kept": self.cache.kept, "seconds": round(time.perf_counter() - self.started, 1)}
            self.rows.append(row)
            print(row, flush=True)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def main() -> int:
    """Generate, watch, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--results", type=Path, default=Path("results/long-generation"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = HeedfulConfig(
        vocab_size=2048, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, score="selective"
    )
    model = HeedfulForCausalLM(config).eval()
    cache = HeedfulCache(4, arguments.budget)
    watch = Watch(cache, arguments.tokens // 20)
    model.generate(
        torch.zeros(1, 8, dtype=torch.long),
        max_new_tokens=arguments.tokens,
        do_sample=True,
        past_key_values=cache,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    growth = watch.rows[-1]["resident_mb"] - watch.rows[0]["resident_mb"]
    arguments.results.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in watch.rows)
    (arguments.results / "memory.jsonl").write_text(lines)
    print(
        f"{growth:.1f} MB from step 100 to step {watch.step}; {cache.nbytes:,} bytes of cache; {cache.stats}"
    )
    return int(growth >= LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())

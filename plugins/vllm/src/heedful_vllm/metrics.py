"""What the engine counts, for /metrics: tokens seen, held and evicted, and bytes.

The model runs in a process of its own; prometheus_client adds up over processes where PROMETHEUS_MULTIPROC_DIR
names a folder (`heedful serve` makes one). Without it nothing is counted, and a line in the log says so.
"""

import os
import time

from heedful_vllm.batch import Batch
from heedful_vllm.bounded import Bounded

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
LOOK_EVERY = "HEEDFUL_LOOK_EVERY"
"""The environment's name for the seconds between two looks into the blocks; default 1."""


class Metrics:
    """Counters and gauges of one model.

    Args:
        own: the model.
        name: by which requests call it.
        every: seconds between two looks into the blocks.
    """

    def __init__(self, own: Bounded, name: str, every: float = 1.0) -> None:
        from prometheus_client import Counter, Gauge

        self.own, self.every, self._looked = own, every, 0.0
        label = ["model_name"]
        seen = Counter("heedful_tokens_seen", "Tokens read, of prompts and answers, per layer.", label)
        gone = Counter("heedful_tokens_evicted", "Tokens evicted, the mean over layers.", label)
        gauges = {
            "held": (
                "heedful_tokens_held",
                "Tokens held by the requests of the last step looked at (once a second), the mean over layers.",
            ),
            "most": ("heedful_tokens_held_most", "Tokens that any layer of any request held at any look."),
            "bytes": ("heedful_bytes_held", "Bytes of the memories of those requests."),
            "each": ("heedful_bytes_per_request", "Bytes of one request, however long it gets."),
            "budget": ("heedful_budget_tokens", "Tokens that the layer with the largest budget may hold."),
        }
        self.seen, self.gone = seen.labels(name), gone.labels(name)
        self.gauges = {
            key: Gauge(title, text, label, multiprocess_mode="max" if key == "most" else "livesum").labels(
                name
            )
            for key, (title, text) in gauges.items()
        }
        self.most = 0
        self.gauges["each"].set(own.layout.nbytes)
        self.gauges["budget"].set(max(own.budgets))

    def count(self, batch: Batch) -> None:
        """After a forward pass."""
        eviction, budgets = self.own.eviction, self.own.budgets
        n, evicted = 0, 0
        for piece in batch.pieces:
            n += piece.length
            after = piece.seen + piece.length
            # the rule counts: what goes is what does not fit
            evicted += sum(max(0, after - b) - max(0, piece.seen - b) for b in budgets)
        self.seen.inc(n)
        if eviction.evict_every == 1 and eviction.threshold is None:
            self.gone.inc(evicted / len(budgets))
        now = time.monotonic()
        if now - self._looked < self.every:
            return
        self._looked = now
        held = [self.own.held(piece.block) for piece in batch.pieces]
        self.most = max(self.most, *(max(one) for one in held))
        self.gauges["held"].set(sum(sum(one) for one in held) / len(budgets))
        self.gauges["most"].set(self.most)
        self.gauges["bytes"].set(len(batch.pieces) * self.own.layout.nbytes)


def metrics_for(own: Bounded, name: str) -> Metrics | None:
    """Counters, where they can be read."""
    if not os.environ.get(FOLDER):
        return None
    return Metrics(own, name, float(os.environ.get(LOOK_EVERY, 1.0)))


def read(folder: str) -> dict[str, float]:
    """What all processes have counted in `folder`, by name."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=folder)
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    return {sample.name: sample.value for sample in samples if sample.name.startswith("heedful_")}

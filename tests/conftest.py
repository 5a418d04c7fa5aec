"""What all tests share: few, always equal hypothesis examples, one thread, a small text to train on."""

import gc
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "heedful",
    derandomize=True,
    deadline=None,
    max_examples=10,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("heedful")

torch.set_num_threads(1)

# Without a GPU, kernels run in Triton's interpreter. It has to know before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


frozen_modules = 0


def pytest_runtest_setup() -> None:
    """Take what was imported out of the garbage collector's sight: each training run collects, over all of it."""
    global frozen_modules
    if len(sys.modules) > frozen_modules + 20:
        gc.collect()
        gc.freeze()
        frozen_modules = len(sys.modules)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Benchmarks bring it back into sight. To ask the collector takes longer than most tests: it counts."""
    global frozen_modules
    if item.path.parent.name == "bench":
        frozen_modules = 0


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 3 kB that is easy to learn: a few words in random order."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run"]
    paragraphs = (" ".join(draw.choices(words, k=60)) + "." for _ in range(12))
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path

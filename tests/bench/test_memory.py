"""The peak of memory, where it is known."""

import pytest
import torch

from heedful.bench.memory import peak_extra_bytes

MB = 2**20


def zeros(megabytes: int) -> torch.Tensor:
    return torch.zeros(megabytes, MB // 4)


def test_the_peak_is_what_lives_at_once():
    def run() -> None:
        first = zeros(8)
        second = zeros(16)
        del first
        third = zeros(4)  # 20 MB alive now, 24 before
        del second, third

    assert peak_extra_bytes(run, "cpu") == 24 * MB


def test_what_was_there_before_does_not_count():
    held = [zeros(32)]

    def run() -> None:
        held.clear()
        held.append(zeros(8))

    assert 0 < peak_extra_bytes(run) <= 8 * MB


def test_a_training_step_counts_what_the_backward_pass_keeps():
    x = zeros(1).requires_grad_()

    def run() -> None:
        x.grad = None
        x.exp().exp().sum().backward()

    run()
    x.grad = None
    assert 3 * MB <= peak_extra_bytes(run) <= 5 * MB


def test_a_run_without_tensors_is_no_measurement():
    with pytest.raises(RuntimeError, match="no allocation was recorded"):
        peak_extra_bytes(lambda: None)

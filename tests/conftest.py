"""What all tests share: few, always equal hypothesis examples and one thread."""

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

"""SAS, Simulated Attention Score: its steps as readable functions, and its expansion in one operation."""

from heedful.ops.sas.expand import Features, expand
from heedful.ops.sas.placing import NOWHERE, Placement, place
from heedful.ops.sas.steps import aggregate_heads, average_heads, simulate_features, simulate_heads

__all__ = [
    "NOWHERE",
    "Features",
    "Placement",
    "aggregate_heads",
    "average_heads",
    "expand",
    "place",
    "simulate_features",
    "simulate_heads",
]

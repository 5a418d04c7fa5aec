"""Who is evicted, and when: the stepwise rule, and faster forms that choose the same tokens."""

from heedful.ops.eviction.rule import Rule, eviction_mask
from heedful.ops.eviction.selectors import departures, least_needed_slot, most_voted_slot

__all__ = ["Rule", "departures", "eviction_mask", "least_needed_slot", "most_voted_slot"]

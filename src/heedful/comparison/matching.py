"""Equal parameters or equal FLOPs: the width of the MLP makes up for what the attention costs."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from heedful.decoder import DecoderConfig

TOLERANCE = 0.01

Match = Literal["none", "params", "flops", "seconds"]
"""What is held equal to the first form: nothing, the size or the FLOPs by the width of the SwiGLU, or the time of
training by the number of steps."""
HELD_EQUAL: dict[Match, str] = {
    "none": "nothing but depth and width",
    "params": "parameters",
    "flops": "training FLOPs",
    "seconds": "seconds of training, by the number of steps",
}


def match_d_ff(
    config: DecoderConfig, target: DecoderConfig, by: Literal["params", "flops"], context: int
) -> int:
    """The width of the SwiGLU at which `config` costs what `target` costs.

    Args:
        config: the form to adjust.
        target: the form to match.
        by: "params" (number of parameters) or "flops" (training FLOPs per token at `context`).
        context: tokens in a row.

    Returns:
        `d_ff`: what it is where the cost is the same, else a multiple of 8 where one comes within 1 %, else any
        whole number.

    Raises:
        ValueError: if no width comes within 1 %.
    """
    cost: Callable[[DecoderConfig], int]
    if by == "params":
        cost = DecoderConfig.parameter_count
    else:

        def cost(c: DecoderConfig) -> int:
            return 3 * c.flops_per_token(context)

    def at(d_ff: int) -> int:
        return cost(dataclasses.replace(config, d_ff=d_ff))

    wanted, base, slope = cost(target), at(1), at(2) - at(1)
    if config.d_ff and cost(config) == wanted:
        return config.d_ff
    exact = 1 + (wanted - base) / slope
    for step in (8, 1):
        d_ff = max(round(exact / step) * step, 1)
        if abs(at(d_ff) - wanted) <= TOLERANCE * wanted:
            return d_ff
    raise ValueError(
        f"--match {by} cannot be reached: {config.attention} x {config.score} costs {base:,} with the "
        f"narrowest SwiGLU and {target.attention} x {target.score} costs {wanted:,} in all; name the costliest "
        f"form first, which the others then match, use a smaller one or --match none"
    )

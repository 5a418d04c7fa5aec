"""How much an adaptation reads where nothing else is said."""


def amount_for(parameters: int, on_gpu: bool) -> dict[str, int]:
    """Tokens of each stage: what two cores do within the hour for 135 M parameters, one GPU in some for 1 to 8 B.

    Args:
        parameters: of the model.
        on_gpu: whether there is one.
    """
    if on_gpu:
        return {"local_tokens": 4_000_000, "distill_tokens": 12_000_000}
    share = min(1.0, 135e6 / max(1, parameters))  # a larger model takes longer per token
    return {"local_tokens": round(300_000 * share), "distill_tokens": round(80_000 * share)}

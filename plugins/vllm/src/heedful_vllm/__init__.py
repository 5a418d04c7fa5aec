"""heedful's models in vLLM: a request takes the memory of its budget, however long it gets."""


def register() -> None:
    """What vLLM calls in every process of its own: make heedful's architectures known, nothing heavier."""
    import heedful.hf  # noqa: F401  registers the configs with transformers
    from heedful_vllm.register import register_all

    register_all()

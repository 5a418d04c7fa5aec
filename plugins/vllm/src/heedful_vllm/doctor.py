"""An engine that is asked once, in float32, for what `heedful doctor --engine vllm` compares with `generate`."""

import os
from typing import Any

from heedful_vllm.metrics import FOLDER, LOOK_EVERY, read

Answer = tuple[list[int], list[dict[int, float]]]
"""Tokens, and for each the log-probabilities of the likeliest ones in its place."""


def ask(
    folder: str, prompts: list[list[int]], options: dict[str, Any], answer: int, place: str
) -> tuple[list[Answer], dict[str, float], str]:
    """The engine's answers of `answer` tokens each, what it counted in the folder `place`, and its version."""
    own = {FOLDER: place, LOOK_EVERY: "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        import vllm

        engine = vllm.LLM(
            folder,
            dtype="float32",
            max_model_len=max(map(len, prompts)) + answer,
            additional_config={"heedful": options},
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2**30,
        )
        how = vllm.SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, logprobs=5)
        outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], how, use_tqdm=False)
        answers = []
        for output in outputs:
            one = output.outputs[0]
            likely = [{token: said.logprob for token, said in at.items()} for at in one.logprobs]
            answers.append((list(one.token_ids), likely))
        del engine
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return answers, read(place), vllm.__version__

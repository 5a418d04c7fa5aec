"""From a prompt to a continuation, the same way everywhere."""

from typing import Any

import torch

from heedful.hf.cache import HeedfulCache
from heedful.hf.modeling import HeedfulForCausalLM
from heedful.hf.names import output_cache


def continue_text(
    model: HeedfulForCausalLM,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    streamer: Any = None,
    **kv: Any,
) -> tuple[str, HeedfulCache]:
    """Continue `prompt` as the model's training text would begin: after the start-of-text token.

    Args:
        model: a trained model.
        tokenizer: the one saved with it.
        prompt: text to continue; may be empty.
        max_new_tokens: tokens to add, at most; an end of text ends earlier.
        temperature: 0 takes the most likely token.
        top_k: draw from the k most likely tokens; 0 draws from all.
        streamer: receives tokens as they come, for `generate`.
        **kv: kv_budget and all else that begins with `kv_`, as in `generate`.

    Returns:
        Prompt and continuation, and the cache as it was at the end.
    """
    ids = tokenizer(prompt)["input_ids"]
    if model.config.model_type == "heedful" or not ids:  # as our training texts begin; others know themselves
        ids = [tokenizer.bos_token_id, *ids]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    output: Any = model.generate(
        torch.tensor([ids], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.bos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **kv,
        return_dict_in_generate=True,
        streamer=streamer,
        **sampling,
    )
    return tokenizer.decode(output.sequences[0], skip_special_tokens=True), output_cache(output)

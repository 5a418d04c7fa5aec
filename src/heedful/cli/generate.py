"""`heedful generate`."""

from collections.abc import Sequence
from dataclasses import MISSING

from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, parse, positional

DESCRIPTION = """Continue a prompt with a trained model.

    heedful generate runs/a "It is a truth" --max-new-tokens 100 --temperature 0.8"""


def run(arguments: Sequence[str]) -> int:
    """Generate, streaming to standard output."""
    values = parse(
        "generate",
        DESCRIPTION,
        [
            positional("run", str, MISSING, "folder of a trained model"),
            positional("prompt", str, "", "text to continue; empty starts a document"),
            flag("max_new_tokens", int, 100, "tokens to add, at most"),
            flag("temperature", float, 0.8, "0 takes the most likely token; higher is more varied"),
            flag("top_k", int, 50, "draw from the k most likely tokens; 0 draws from all"),
            flag("seed", int, 0, "seed of the draws"),
        ],
        arguments,
    )
    if values["max_new_tokens"] < 1:
        raise UsageError(f"--max-new-tokens must be 1 or more, got {values['max_new_tokens']}")
    if values["temperature"] < 0:
        raise UsageError(f"--temperature must be 0 or more, got {values['temperature']}")
    if values["top_k"] < 0:
        raise UsageError(f"--top-k must be 0 or more, got {values['top_k']}")

    from transformers import TextStreamer, set_seed

    from heedful.hf.generation import continue_text
    from heedful.hf.load import load_model, load_tokenizer

    model, tokenizer = load_model(values["run"]), load_tokenizer(values["run"])
    set_seed(values["seed"])
    continue_text(
        model,
        tokenizer,
        values["prompt"],
        max_new_tokens=values["max_new_tokens"],
        temperature=values["temperature"],
        top_k=values["top_k"],
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )
    return 0

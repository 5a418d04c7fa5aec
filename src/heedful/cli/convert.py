"""`heedful convert`."""

from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from heedful.attention.eviction import POLICIES, Eviction
from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, kv_budget_of, options_section, parse, peek, positional
from heedful.cli.signals import cleaning_up
from heedful.screen import spinner

DESCRIPTION = """Make a checkpoint forget: convert a Hugging Face model into one with heedful's attention.

The model's own blocks stay; the attention of every layer gets a selector, which only says who is evicted: as long
as every token is held, the converted model predicts what its source predicts. Weights are copied as files. Known
are Llama (SmolLM), Mistral, Mixtral, Qwen 2 and 3, Gemma 2 and 3 (text), OLMo 2, Phi-3, GPT-2 and GPT-NeoX
(Pythia): folders with safetensors, or .gguf files. Then: heedful adapt OUT --data my.txt."""


def run(arguments: Sequence[str]) -> int:
    """Convert, or convert back."""
    values = parse(
        "convert",
        DESCRIPTION,
        [
            positional("source", str, MISSING, "folder of a checkpoint, or a .gguf file"),
            positional("out", str, MISSING, "folder for the converted model"),
            flag(
                "attention",
                Literal["source", "sas"],
                "source",
                "heads: the source's own, or more of them, simulated from those (sas)",
            ),
            _sas_options() if peek(arguments, "attention", "source") == "sas" else None,
            flag(
                "score", str, "selective", "what happens to the logits: selective, or softmax (nobody votes)"
            ),
            flag(
                "selector",
                Literal["retention", "added", "head"],
                "retention",
                "who says which tokens go: each token as it arrives (retention), an added selection head by "
                "which later tokens vote (added), or attention head 0 (head)",
            ),
            flag(
                "per",
                Literal["layer", "kv_head"],
                "layer",
                "a selector per layer, or per KV head",
            ),
            flag(
                "select_dim",
                int,
                32,
                "size of an added selection head, half the hidden features of a retention",
            ),
            flag(
                "subtract",
                bool | None,
                None,
                "subtract votes from the logits, else they only say who goes; if left out where head 0 casts them",
            ),
            flag(
                "kv_budget",
                str | None,
                None,
                "tokens each layer holds by default: 256, 256,128,..., or full",
            ),
            flag(
                "kv_policy",
                str | None,
                None,
                f"which token is evicted by default: {', '.join(POLICIES)}; if left out: selective",
            ),
            flag("kv_grace", int | None, None, "newest tokens that are never evicted by default"),
            flag("kv_first", int | None, None, "first tokens that are never evicted by default"),
            flag("back", bool, False, "the other way: give the stock checkpoint back"),
            flag("force", bool, False, "replace OUT if it is there"),
        ],
        arguments,
    )
    with cleaning_up():
        _convert(values)
    return 0


def _convert(values: dict[str, Any]) -> None:
    source, out, force = Path(values["source"]), Path(values["out"]), values["force"]
    console = Console(stderr=True, highlight=False)
    if values["back"]:
        with spinner(console, "converting back"):
            from heedful.hf.converted.convert import convert_back

            dropped = convert_back(source, out, force=force)
        _say_left_behind(source)
        counts = {"selectors": dropped.selection, "simulated heads": dropped.expansion}
        what = " and ".join(f"{n:,} parameters of {of}" for of, n in counts.items() if n)
        print(f"{out}: the stock model; {f'{what} were' if what else 'nothing was'} dropped")
        if dropped.expansion:
            print(
                "what the simulated heads have learned is lost: they cannot be folded into the source's heads"
            )
        return
    names = "attention", "score", "selector", "per", "select_dim", "subtract"
    options = {name: values[name] for name in names}
    options["attention_options"] = values.get("attention_options", {})
    try:
        kv = {name: values[name] for name in ("kv_policy", "kv_grace", "kv_first")}
        eviction = Eviction.of(kv_budget_of(values["kv_budget"]), **kv)
    except ValueError as error:
        raise UsageError(str(error)) from None
    with spinner(console, "converting"):
        from heedful.hf.converted.request import convert_path

        convert_path(source, out, force=force, eviction=eviction, **options)
    _say_left_behind(source)
    _say(out, options)


def _say_left_behind(source: Path) -> None:
    from heedful.hf.converted.checkpoint import Checkpoint
    from heedful.hf.saved import MODULE

    left = Checkpoint.read(source).left_behind() if source.is_dir() else []
    left = [what for what in left if not what.startswith(f"{MODULE}.py")]  # of ours: it is made anew
    if left:
        print(f"not copied: {', '.join(left)}")


def _say(out: Path, options: dict[str, Any]) -> None:
    from transformers import AutoConfig

    from heedful.hf.converted.checkpoint import Checkpoint
    from heedful.hf.converted.convert import ADDED
    from heedful.hf.converted.model import windows_of
    from heedful.hf.converted.settings import Conversion

    checkpoint = Checkpoint.read(out)
    added, total = sum(map(checkpoint.parameters, ADDED)), checkpoint.parameters()
    share = f"{added:,} added ({added / total:.1%})"
    print(f"{out}: converted, {total - added:,} parameters as they were and {share}")
    config = AutoConfig.from_pretrained(out)
    if None not in windows_of(config):
        print(
            f"its layers hold {windows_of(config)[0]:,} tokens, their sliding window, unless a budget is lower"
        )
    elif options["score"] == "selective" and options["selector"] != "head":
        print(f"until it has learned whom to forget, the oldest go: heedful adapt {out} --data my.txt")
    sizes = Conversion.of(config).sizes(config)
    if sizes is not None:
        print(
            f"its {sizes.sim_heads} simulated heads are copies of {sizes.heads} until they are trained "
            f"(Trainer, PEFT); a token takes {sizes.of_cache:g} times the cache of the source, and attention as "
            f"many times the work"
        )


def _sas_options() -> Any:
    heads = flag(
        "sim_heads", int | None, None, "simulated heads, a multiple of the source's; 3 times as many if None"
    )
    width = flag(
        "sim_head_dim",
        int | None,
        None,
        "simulated size of queries and keys; the source's, unchanged, if None",
    )
    kernel = flag("kernel_size", int, 3, "width of the convolution over features, odd")
    return options_section("attention", ["sas"], [heads, width, kernel])

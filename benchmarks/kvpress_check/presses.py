"""What kvpress does with small random models; run by `make check-kvpress`, in an environment that has kvpress.

    python benchmarks/kvpress_check/presses.py FOLDER

Writes two models of four query heads, with one key head and with two, as transformers saves them, and in
`presses.safetensors` the prompts and, for each press, the scores of all tokens and who survived. The presses are
kvpress's own. Its presses may evict any token, our rule never the first, and our H2O sums what theirs averages and
keeps the recent half: so each runs twice, as it is, and told that those tokens are safe.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    DecodingPress,
    KeyDiffPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

ROWS, LENGTH, KEPT, WINDOW = 2, 160, 96, 32
STEPS, TARGET = 120, 24
RECENT = (KEPT + 1) // 2 - 1
"""Tokens of the prompt that H2O's recent half protects when one more arrives."""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SIZES |= {"head_dim": 16, "vocab_size": 101, "max_position_embeddings": 512}


class Watched:
    """Before a press: its scores, layer by layer, are kept; tokens that are safe get the best."""

    def watch(self, safe: tuple[int, ...] = (), as_sums: bool = False) -> Any:
        self.safe, self.as_sums = safe, as_sums
        self.seen: list[Tensor] = []
        """Scores as kvpress makes them, one (B, G, S) for each call."""
        self.keys: list[Tensor] = []
        """The keys they are of, (B, G, S, D)."""
        self.known: dict[int, Tensor] = {}
        """The keys of the first tokens of each layer: evictions reorder what is held."""
        return self

    def score(self, module: Any, hidden_states: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        scores = super().score(module, hidden_states, keys, *rest)  # type: ignore[misc]
        self.seen.append(scores.clone())
        self.keys.append(keys.clone())
        known = self.known.setdefault(module.layer_idx, keys.clone())
        if self.as_sums:  # an average over the queries that saw the token: the sum again
            scores = scores * torch.arange(scores.shape[-1], 0, -1)
        for place in self.safe:
            scores = scores.masked_fill((keys == known[:, :, place, None]).all(-1), torch.inf)
        return scores


class Streaming(Watched, StreamingLLMPress):
    pass


class Observed(Watched, ObservedAttentionPress):
    pass


class TOVA(Watched, TOVAPress):
    pass


class SnapKV(Watched, SnapKVPress):
    pass


class KeyDiff(Watched, KeyDiffPress):
    pass


def main(folder: Path) -> None:
    disable_progress_bar()
    out: dict[str, Tensor] = {}
    for name, key_heads in (("one", 1), ("two", 2)):
        model = make_model(key_heads)
        model.save_pretrained(folder / name)
        ids = torch.randint(3, 101, (ROWS, LENGTH), generator=torch.Generator().manual_seed(7))
        out[f"{name}/ids"] = ids
        ratio = 1 - KEPT / LENGTH
        recent = tuple(range(LENGTH - RECENT, LENGTH))
        presses = {
            "streaming": Streaming(ratio, n_sink=4),
            "h2o": Observed(ratio),
            "tova": TOVA(ratio),
            "snapkv": SnapKV(ratio, window_size=WINDOW),
            "keydiff": KeyDiff(ratio),
        }
        for policy, press in presses.items():
            key, safe = f"{name}/{policy}", (0, *recent) if policy == "h2o" else (0,)
            _, out[f"{key}/as they are"] = after_the_prompt(model, press.watch(), ids)
            told = press.watch(safe, as_sums=policy == "h2o")
            out[f"{key}/scores"], out[f"{key}/survivors"] = after_the_prompt(model, told, ids)
    model = LlamaForCausalLM.from_pretrained(folder / "one", dtype=torch.float64).eval()
    for policy, press in {"tova": TOVA().watch((0,)), "keydiff": KeyDiff().watch((0,))}.items():
        held, logits = step_by_step(model, press, out["one/ids"][:, :STEPS])
        out |= {f"steps/{policy}/held": held, f"steps/{policy}/logits": logits}
    save_file({key: value.contiguous() for key, value in out.items()}, folder / "presses.safetensors")


def make_model(key_heads: int) -> LlamaForCausalLM:
    """Of float64, with weights large enough for attention to choose."""
    torch.manual_seed(key_heads)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=key_heads)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def after_the_prompt(model: LlamaForCausalLM, press: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compressed once: scores (L, B, G, T) and the positions that are left (L, B, G, n), in order."""
    model.set_attn_implementation("eager" if isinstance(press, Observed) else "sdpa")
    cache = DynamicCache()
    with press(model):
        model(ids, past_key_values=cache)
    survivors = [positions(layer.keys, keys) for layer, keys in zip(cache.layers, press.keys, strict=True)]
    return torch.stack(press.seen), torch.stack(survivors)


@torch.no_grad()
def step_by_step(model: LlamaForCausalLM, press: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """One token goes with every token that comes, to `TARGET` tokens: who each query met, and its logits.

    Returns:
        held (T - TARGET, L, B, TARGET + 1) positions, in order, and logits (B, T - TARGET, V).
    """
    model.set_attn_implementation("sdpa")
    cache, logits, held = DynamicCache(), [], []
    layers = model.config.num_hidden_layers
    with DecodingPress(press, compression_interval=1, target_size=TARGET)(model):
        model(ids[:, :TARGET], past_key_values=cache)
        everything = [layer.keys.clone() for layer in cache.layers]
        press.known = dict(enumerate(everything))
        for t in range(TARGET, ids.shape[1]):
            place = torch.tensor([t])
            given = {"position_ids": place[None], "cache_position": place}
            logits.append(model(ids[:, t : t + 1], past_key_values=cache, **given).logits)
            met = press.keys[-layers:]
            everything = [torch.cat((k, new[:, :, -1:]), 2) for k, new in zip(everything, met, strict=True)]
            held.append(torch.stack([positions(k, of)[:, 0] for k, of in zip(met, everything, strict=True)]))
    return torch.stack(held), torch.cat(logits, 1)


def positions(keys: Tensor, everything: Tensor) -> Tensor:
    """Where each of the keys (B, G, n, D) is among all of them (B, G, T, D), in order."""
    same = (keys[:, :, :, None] == everything[:, :, None]).all(-1)
    assert bool((same.sum(-1) == 1).all()), "each key is to be found once"
    return same.int().argmax(-1).sort(-1).values


if __name__ == "__main__":
    main(Path(sys.argv[1]))

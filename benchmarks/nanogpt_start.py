"""nanoGPT's published 1.88 in heedful's block: the arm `mha` of the study shakespeare, from nanoGPT's own start.

    python benchmarks/nanogpt_start.py --data tinyshakespeare.txt --out runs/nanogpt

Three minutes on one core. nanoGPT draws every weight from N(0, 0.02), but those that write into the residual stream
from N(0, 0.02 / sqrt(2 L)); heedful starts larger. Nothing else differs from the study.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

import heedful.training.run as training
from heedful.hf import HeedfulForCausalLM
from heedful.study import load_study


class FromNanoGPT(HeedfulForCausalLM):
    """The same model, from nanoGPT's start."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        into_residual = 0.02 / math.sqrt(2 * config.num_hidden_layers)
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    writes = name.endswith(("o_proj", "down_proj"))
                    nn.init.normal_(module.weight, std=into_residual if writes else 0.02)


def main() -> None:
    """Train it, and say what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="tinyshakespeare.txt, 1,115,394 characters")
    parser.add_argument("--out", type=Path, required=True)
    named = parser.parse_args()
    study = load_study("shakespeare", data=named.data)
    arm = dataclasses.replace(study.arms["mha"], lr=study.rates[0])
    names = [name for name, _ in FromNanoGPT(arm.to_config(65, 64)).named_modules()]
    assert sum(name.endswith(("o_proj", "down_proj")) for name in names) == 2 * arm.n_layers, names
    training.HeedfulForCausalLM = FromNanoGPT  # type: ignore[misc]
    print(training.train(arm, named.out).val_loss)


if __name__ == "__main__":
    main()

"""Changed weights of a converted model, written where they are."""

import os
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from heedful.attention.eviction import Eviction
from heedful.files import write_json, write_text
from heedful.hf.converted.beside import SOURCE_CARD, card
from heedful.hf.converted.checkpoint import CONFIG, Checkpoint, tensors
from heedful.hf.converted.settings import FIELD
from heedful.hf.saved import CARD


def rewrite(folder: Path, changed: dict[str, Tensor], eviction: Eviction, facts: dict[str, str]) -> None:
    """Replace some weights, the default eviction and the card; the files that hold other weights stay as they are.

    Every new file is written whole before the first takes its place.

    Args:
        folder: of a converted model.
        changed: by the names that the model gives its parameters.
        eviction: what `generate` holds from now on.
        facts: lines for the card.

    Raises:
        ValueError: for a tensor that the folder does not hold.
    """
    checkpoint = Checkpoint.read(folder)
    here = {_name(checkpoint, name): tensor for name, tensor in changed.items()}
    waiting: list[tuple[Path, Path]] = []
    try:
        for file in checkpoint.files:
            held = [name for name, home in checkpoint.home.items() if home == file]
            if not here.keys() & set(held):
                continue
            new = dict(tensors(folder / file, held))
            for name in here.keys() & set(held):
                new[name] = here[name].detach().cpu().to(new[name].dtype).contiguous()
            path = folder / f"{file}.new"
            waiting.append((path, folder / file))
            save_file(new, path, {"format": "pt"})
            path.chmod(0o644)
        for path, target in waiting:
            os.replace(path, target)
    except BaseException:
        for path, _ in waiting:
            path.unlink(missing_ok=True)
        raise
    config: dict[str, Any] = dict(checkpoint.config)
    config[FIELD] = {**config[FIELD], "eviction": eviction.to_dict() if eviction.evicts else None}
    write_json(folder / CONFIG, config)
    card_before = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).exists() else ""
    named = re.search(r"^\| source \| (.+), [\w.-]+ \|$", card_before, re.M)
    source = named[1] if named else "a checkpoint"
    source_card = folder / SOURCE_CARD
    write_text(folder / CARD, card(config, source, source_card if source_card.exists() else None, facts))


def _name(checkpoint: Checkpoint, name: str) -> str:
    """What the checkpoint calls a parameter: saved as a base model, its names lack a prefix."""
    for known in (name, name.partition(".")[2]):
        if known in checkpoint.home:
            return known
    raise ValueError(f"{checkpoint.folder} holds no tensor {name}; it is not the folder of this model")

"""The rows that a trained model is measured on, one text per row, as a cache that evicts needs them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from heedful.data import (
    TokenDataset,
    by_document,
    count_bytes,
    encode_documents,
    load_data,
    load_text,
    read_validation,
    token_bytes,
)
from heedful.hf.converted.known import family_of
from heedful.training.settings import SETTINGS, TrainSettings


@dataclass(frozen=True)
class HeldOut:
    """Rows to measure on."""

    name: str
    """What the text or the task is called."""
    rows: TokenDataset
    """input_ids, labels and, for text, attention_mask; one document or a piece of one per row."""
    n_bytes: int | None
    """UTF-8 bytes that the labelled tokens stand for; None for a synthetic task."""
    context: int
    """Tokens in a row."""

    def part(self, start: int, stop: int, tokenizer: Any = None) -> "HeldOut":
        """Rows `start` to `stop`; the tokenizer counts their bytes."""
        tensors = {name: tensor[start:stop] for name, tensor in self.rows.tensors.items()}
        n_bytes = None
        if self.n_bytes is not None and tokenizer is not None:
            n_bytes = count_bytes(tensors["labels"], token_bytes(tokenizer))
        return HeldOut(self.name, TokenDataset(tensors), n_bytes, self.context)


def held_out(
    run: str | Path,
    tokenizer: Any | None,
    data: str | None = None,
    *,
    text_column: str | None = None,
    context: int | None = None,
) -> HeldOut:
    """What the model in `run` is measured on.

    Args:
        run: the folder of a finished training run, which says its context and its data; or of a converted model.
        tokenizer: the one saved with the model; None for a synthetic task.
        data: a file, a folder or "austen", all of it; None takes the validation data of the run.
        text_column: which column holds the texts, where `data` is a table; None takes the run's.
        context: tokens in a row; None takes the run's, for a converted model 2,048 or what it can read.

    Raises:
        FileNotFoundError: if `run` has no settings or `data` does not exist.
        ValueError: for a synthetic task with `data` or `context`, a converted model without `data`, or a text that
            cannot be used.
    """
    if text_column is not None and data is None:
        raise ValueError(
            f"--text-column {text_column} belongs to --data, and none is given; leave it out or name the data"
        )
    path = Path(run) / SETTINGS
    if not path.exists() and _is_converted(Path(run)):
        if data is None or tokenizer is None:
            raise ValueError(f"{run} was not trained here: name a text it has not seen with --data")
        most = AutoConfig.from_pretrained(run, local_files_only=True).max_position_embeddings
        documents = read_validation(data, column=text_column or "text")
        return _of_text(Path(data).name, documents, tokenizer, context or min(2048, most))
    if not path.exists():
        raise FileNotFoundError(
            f"{run} holds no training run (no {SETTINGS}); expected what heedful train left"
        )
    settings = TrainSettings.load(path)
    if settings.data.startswith("synthetic"):
        if data is not None or context is not None:
            raise ValueError(
                f"{run} was trained on {settings.data} and reads no text; leave out --data and --context"
            )
        options = settings.task_options
        own = load_data(
            settings.data,
            context=settings.context,
            seed=settings.seed,
            train_examples=1,
            task_options=options,
        )
        return HeldOut(own.name, own.validation, None, own.context)
    if tokenizer is None:
        raise ValueError(f"{run} was trained on text: its tokenizer is needed")
    if data is not None:
        documents = read_validation(data, column=text_column or settings.text_column)
        name = data if data == "austen" else Path(data).name
    else:
        text = load_text(settings.data, settings.val_data, column=settings.text_column)
        documents, name = text.validation, f"{text.name} (validation)"
    return _of_text(name, documents, tokenizer, context or settings.context)


def _is_converted(run: Path) -> bool:
    if not (run / "config.json").exists():
        return False
    config, _ = PreTrainedConfig.get_config_dict(run, local_files_only=True)
    return family_of(str(config.get("model_type"))) is not None


def _of_text(name: str, documents: Sequence[str], tokenizer: Any, context: int) -> HeldOut:
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tensors = by_document(encode_documents(tokenizer, documents), context, start)
    try:
        n_bytes = count_bytes(tensors["labels"], token_bytes(tokenizer))
    except ValueError:  # a tokenizer whose tokens stand for no fixed number of bytes
        n_bytes = None
    return HeldOut(name, TokenDataset(tensors), n_bytes, context)

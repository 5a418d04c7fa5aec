"""GGUF files, as far as transformers reads them."""

import contextlib
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from heedful.files import made_folder


@contextlib.contextmanager
def from_gguf(file: Path, beside: Path) -> Iterator[Path]:
    """The model and tokenizer of a GGUF file as a stock folder, beside where the result will be; gone afterwards.

    Quantized weights become float32, as transformers reads them.

    Raises:
        ImportError: if the package gguf is missing.
        ValueError: if transformers cannot read it.
    """
    if find_spec("gguf") is None:
        raise ImportError("reading a .gguf file needs the package gguf; install it with: pip install gguf")
    with (
        made_folder(beside.parent),
        tempfile.TemporaryDirectory(prefix=f".{beside.name}-gguf-", dir=beside.parent) as folder,
    ):
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True
            )
        except Exception as error:  # whatever a damaged file leads to
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{file} cannot be read by transformers: {reason}") from error
        finally:
            logging.enable_progress_bar()
        # The weights are plain floats now, but the model still says that it is quantized.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        yield Path(folder)

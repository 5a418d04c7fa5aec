"""Loading a trained model from its folder, or saying plainly why it cannot be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from heedful.decoder import MOST_LAYERS
from heedful.hf.configuration import HeedfulConfig
from heedful.hf.converted.checkpoint import Checkpoint, read_json
from heedful.hf.converted.convert import patch
from heedful.hf.converted.families import model_class
from heedful.hf.converted.known import FAMILIES, family_of
from heedful.hf.converted.settings import Conversion
from heedful.hf.modeling import HeedfulForCausalLM
from heedful.ops.checks import check_most

_LAYERS = "num_hidden_layers", "n_layer", "num_layers"
"""What configs call the number of blocks."""
_FEW = 2**22
"""Parameters that may be missing before they are counted: transformers names them better."""


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Whatever a damaged folder makes libraries say, in one line that names the folder."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # transformers checks a config with errors of its own, and not all of it
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise ValueError(
            f"the model in {folder} cannot be read ({reason}); train or copy it again"
        ) from error


def _check_weights(folder: Path, config: dict[str, Any]) -> None:
    """Raise for weights that must not be read, or a config that asks for far more than there is.

    Raises:
        OSError: for missing weights.
        ValueError: for pickled or damaged ones, an index that leaves the folder, or sizes without weights.
    """
    if (other := config.get("transformers_weights")) is not None:
        raise ValueError(f"config.json names weights of its own, {other!r}; expected model.safetensors")
    found = Checkpoint.read(folder).parameters()
    for name in _LAYERS:
        if isinstance(config.get(name), int):
            check_most(name, config[name], MOST_LAYERS)
    if config.get("model_type") != "heedful":
        return
    # transformers makes what is missing before it says so
    asked = HeedfulConfig.from_dict(config).to_decoder_config().parameter_count()
    if asked > _FEW + 4 * found:
        raise ValueError(f"config.json asks for {asked:,} parameters, the weights are {found:,}")


def load_model(folder: str | Path) -> Any:
    """The model in `folder`, trained with heedful or converted, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if it is damaged, of another kind, or weights are missing or of another shape: a model
            with fresh weights in it would run and be wrong.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; expected the folder of a trained model")
    if not (folder / "config.json").exists():
        running = (folder / "train.json").exists()
        hint = f"its training has not finished: heedful train --resume --out {folder}" if running else ""
        raise FileNotFoundError(f"{folder} holds no model (no config.json){'; ' if hint else ''}{hint}")
    with _one_line(folder):
        config = read_json(folder / "config.json", "the config of a model")
    kind = str(config.get("model_type"))
    family = family_of(kind)
    if kind != "heedful" and family is None:
        more = "; `heedful convert` makes one of it" if kind in FAMILIES else ""
        raise ValueError(f"{folder} holds a {kind!r} model, expected a heedful one{more}")
    with _one_line(folder):
        _check_weights(folder, config)
        own: Any = HeedfulForCausalLM if family is None else model_class(family)
        with _quiet():
            model, report = own.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    if (
        family is not None
    ):  # buffers of old checkpoints, heads of other tasks: stock models leave them out as well
        report.pop("unexpected_keys", None)
    wrong = {
        kind: sorted(map(str, names)) for kind, names in report.items() if names and kind != "error_msgs"
    }
    if wrong:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {wrong}; train or copy it again"
        )
    return model.eval()


def load_source(folder: str | Path) -> Any:
    """A stock model, so that it can run with heedful's caches; one that is converted as it is.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if it is damaged, or of a kind that cannot be converted.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no model (no config.json)")
    if str(HeedfulConfig.get_config_dict(folder)[0].get("model_type")) not in FAMILIES:
        return load_model(folder)
    with _one_line(Path(folder)):
        Checkpoint.read(folder)
    with _quiet():
        stock = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return patch(stock.eval(), Conversion(score="softmax"))


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved beside a model.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no tokenizer (no tokenizer.json): its model was not trained on text"
        )
    try:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (folder / name).exists():
                read_json(folder / name, "a part of the tokenizer")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise ValueError(f"the tokenizer in {folder} cannot be read ({reason})") from error

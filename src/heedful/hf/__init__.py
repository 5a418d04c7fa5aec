"""The language model for the Hugging Face world; importing this registers it with the Auto classes."""

try:
    import transformers
except ImportError as error:  # the extra is optional, the reason must be plain
    raise ImportError(
        'heedful.hf needs transformers (>= 5.14, < 6); install it with: pip install "heedful[lm]"'
    ) from error

from transformers import AutoConfig, AutoModelForCausalLM

from heedful.hf.cache import HeedfulCache
from heedful.hf.configuration import HeedfulConfig
from heedful.hf.modeling import HeedfulForCausalLM

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if not (5, 14) <= _VERSION < (6, 0):
    raise ImportError(
        f"heedful.hf supports transformers >= 5.14 and < 6, found {transformers.__version__}; "
        f'install a supported one with: pip install "heedful[lm]"'
    )

AutoConfig.register("heedful", HeedfulConfig, exist_ok=True)
AutoModelForCausalLM.register(HeedfulConfig, HeedfulForCausalLM, exist_ok=True)

__all__ = ["HeedfulCache", "HeedfulConfig", "HeedfulForCausalLM"]

"""By this file `generate(custom_generate=...)` of transformers holds to a budget; the code is in heedful."""

try:
    from heedful.hf.converted.once import generate
except ModuleNotFoundError as error:
    if error.name != "heedful":
        raise
    raise ImportError(
        'this custom_generate needs heedful; install it with: pip install "heedful[lm]"'
    ) from error

__all__ = ["generate"]

"""Which versions of transformers are supported: those that were tested, and nothing beyond."""

try:
    import transformers
except ImportError as error:  # the extra is optional, the reason must be plain
    raise ImportError(
        'heedful.hf needs transformers (>= 5.17, < 5.25); install it with: pip install "heedful[lm]"'
    ) from error

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
"""Major and minor version of the installed transformers."""

if not (5, 17) <= VERSION < (5, 25):
    raise ImportError(
        f"heedful.hf supports transformers >= 5.17 and < 5.25, found {transformers.__version__}; "
        f'install a supported one with: pip install "heedful[lm]"'
    )

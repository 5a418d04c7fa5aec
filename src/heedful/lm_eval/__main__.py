"""`python -m heedful.lm_eval ...`: the command of lm-evaluation-harness, with `--model heedful` and our tasks."""

import sys

from heedful.lm_eval import NEEDED, TASKS


def main() -> None:
    """Register the model, add the folder of tasks unless another is named, and hand over."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        sys.exit(f"{NEEDED}; {error.name} is missing")
    if "heedful" not in model_registry:  # later versions find it by its entry point
        model_registry.register("heedful", target="heedful.lm_eval.model:HeedfulLM")
    flags = {word.partition("=")[0] for word in sys.argv}
    if len(sys.argv) > 2 and not flags & {"--include_path", "--config", "-C"}:
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()

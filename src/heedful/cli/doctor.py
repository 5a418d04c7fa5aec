"""`heedful doctor`: without a model it works without the extras, since it says which are missing."""

from collections.abc import Sequence

from heedful.cli.errors import UsageError
from heedful.cli.wrapping import print_report, wrapped
from heedful.doctor import examine, lines
from heedful.ops.checks import did_you_mean

DESCRIPTION = """usage: heedful doctor [RUN] [options]

Say what is active on this machine, and why: versions, extras that are missing, the processor and its
threads, the GPU, and which implementation impl="auto" takes.

With RUN, the folder of a trained or converted model, prove that a budget is active in it: text is generated beyond
the budget, the tokens held and evicted are counted in every layer, and the tokens are compared with those of one
pass with the eviction mask. It fails, with exit code 1, where no budget is saved or given, nothing was evicted, a
layer holds too much, or a token differs. The model runs in float32, so that rounding does not decide who goes.

With --engine vllm the same is proved of vLLM's engine: it is started with the model, answers prompts of unequal
length side by side, and its tokens and counts are compared with those of generate.

  --engine NAME       vllm: prove it of the engine that `heedful serve` runs
  --kv-budget N       tokens the cache of each layer holds: 64, 64,32,...; what is saved with the model if left out
  --kv-policy NAME    which token is evicted; the saved one, or selective, if left out
  --json              the same as JSON"""

_VALUES = "--kv-budget", "--kv-policy", "--engine"


def run(arguments: Sequence[str]) -> int:
    """Print the report, on the machine or on a model."""
    if any(word in ("-h", "--help") for word in arguments):
        print(wrapped(DESCRIPTION))
        return 0
    folder, values, as_json = _parsed(arguments)
    if folder is not None:
        engine = values.get("--engine")
        if engine not in (None, "vllm"):
            raise UsageError(f"--engine must be vllm, got {engine!r}")
        if engine:
            from heedful.cli.doctor_engine import examine_engine

            return examine_engine(folder, values.get("--kv-budget"), values.get("--kv-policy"), as_json)
        from heedful.cli.doctor_run import examine_run

        return examine_run(folder, values.get("--kv-budget"), values.get("--kv-policy"), as_json)
    for name in values:
        raise UsageError(f"{name} needs the folder of a model: heedful doctor RUN {name} ...")
    report = examine()
    print_report(report, None if as_json else lines(report))
    return 0


def _parsed(arguments: Sequence[str]) -> tuple[str | None, dict[str, str], bool]:
    """The folder, the values of flags, and whether JSON is asked for."""
    folder, values, as_json = None, dict[str, str](), False
    left = list(arguments)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name == "--json" and not equals:
            as_json = True
        elif name in _VALUES:
            if not equals and not left:
                raise UsageError(f"{name} needs a value; see heedful doctor --help")
            values[name] = value if equals else left.pop(0)
        elif name.startswith("-"):
            hint = did_you_mean(name, ["--json", *_VALUES])
            raise UsageError(f"unknown option {name}; {hint}see heedful doctor --help")
        elif folder is not None:
            raise UsageError(f"one folder at a time, got {folder} and {name}")
        else:
            folder = f"{name}{equals}{value}"
    return folder, values, as_json

"""The command line: `heedful COMMAND --help` teaches each."""

import importlib
import io
import os
import sys
from collections.abc import Sequence

from heedful.cli.signals import Terminated
from heedful.forms import load_forms, name_forms

COMMANDS = {
    "train": "train a language model on your text, with any attention and score",
    "compare": "train several forms alike and compare them: table, plot, raw data",
    "study": "try a claim: enough seeds, a verdict, a page",
    "convert": "make a Hugging Face checkpoint forget: give it heedful's attention, or take it back",
    "adapt": "teach a converted checkpoint whom to forget",
    "generate": "continue a prompt with a trained model",
    "serve": "serve a model with vLLM's OpenAI server, each request in bounded memory",
    "eval": "measure a trained model with a KV cache of few tokens: table, plot, raw data",
    "bench": "measure speed, as ratios of runs that take turns",
    "budget": "find how few cached tokens every layer needs for a given loss",
    "demo": "the whole story in some minutes, offline",
    "ls": "list the attention and score forms",
    "show": "explain one form: what it is, its formula, its cost, its paper",
    "doctor": "say what is active here and why; or prove that a model keeps to its budget",
}

USAGE = """heedful: attention that simulates more and keeps less.

usage: heedful COMMAND [options]
       heedful COMMAND --help

commands:
{commands}

A form of your own: put it in a file and name it with --forms my_form.py (or HEEDFUL_FORMS=my_form.py).
HEEDFUL_TRACEBACK=1 shows where an error came from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a formula has signs that some terminals do not know
        sys.stdout.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    try:
        arguments = _take_forms(arguments)
        command = arguments[0] if arguments else "--help"
        if command in ("-h", "--help", "help"):
            print(usage())
            return 0
        if command == "--version":
            from heedful import __version__

            print(f"heedful {__version__}")
            return 0
        if command not in COMMANDS:
            from heedful.ops.checks import did_you_mean

            hint = did_you_mean(command, COMMANDS)
            return _fail(f"unknown command {command!r}; {hint}commands: {', '.join(COMMANDS)}", 2)
        _load_forms()
        code = importlib.import_module(f"heedful.cli.{command}").run(arguments[1:])
        sys.stdout.flush()  # at exit nobody would hear that the reader is gone
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Terminated as signal:
        return _fail(f"stopped by {signal}; nothing was left behind", 128 + signal.number, command)
    except BrokenPipeError:  # who reads what is printed has seen enough, as `head` does
        return _unread()
    except SystemExit as stopped:
        if isinstance(stopped.__context__, BrokenPipeError):  # what rich makes of it
            return _unread()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            return _unread()
        raise
    except Exception as error:
        if os.environ.get("HEEDFUL_TRACEBACK"):
            raise
        return _fail(_message(error), _exit_code(error), command)


def _unread() -> int:
    """Say no more; the code with which the signal would end it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def usage() -> str:
    """The text of `heedful --help`."""
    from heedful.cli.wrapping import wrapped

    width = max(map(len, COMMANDS))
    return wrapped(USAGE.format(commands="\n".join(f"  {n:<{width}}  {t}" for n, t in COMMANDS.items())))


def _message(error: Exception) -> str:
    from heedful.cli.errors import UsageError

    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or ''}: {error.strerror}".lstrip(": ")
    if isinstance(error, ImportError) and "heedful" not in text:
        return f'{text}; the command line needs: pip install "heedful[lm]"'
    lines = text.splitlines() or [type(error).__name__]
    known = isinstance(error, UsageError | ValueError | TypeError | OSError | ImportError | RuntimeError)
    return " ".join(line.strip() for line in lines) if known else f"{type(error).__name__}: {lines[0]}"


def _exit_code(error: Exception) -> int:
    from heedful.cli.errors import UsageError
    from heedful.errors import Interrupted

    if isinstance(error, Interrupted):
        return 130
    return 2 if isinstance(error, UsageError) else 1


def _fail(message: str, code: int, command: str = "") -> int:
    print(f"heedful {command}".rstrip() + f": {message}", file=sys.stderr)
    return code


def _take_forms(arguments: list[str]) -> list[str]:
    """Move `--forms X` from the arguments to the environment, where subprocesses find it too."""
    rest: list[str] = []
    given: list[str] = []
    waiting = False
    for argument in arguments:
        if waiting:
            given.append(argument)
            waiting = False
        elif argument == "--forms":
            waiting = True
        elif argument.startswith("--forms="):
            given.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if waiting:
        from heedful.cli.errors import UsageError

        raise UsageError("--forms needs a file or a module: --forms my_form.py")
    if given:
        name_forms(",".join(given).split(","))
    return rest


def _load_forms() -> None:
    from heedful.cli.errors import UsageError

    try:
        load_forms()
    except (FileNotFoundError, ImportError) as error:
        raise UsageError(f"--forms: {error}") from error

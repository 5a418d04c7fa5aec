"""Forms of one's own, named by files or modules: in `HEEDFUL_FORMS`, which processes of this one inherit."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

VARIABLE = "HEEDFUL_FORMS"


def name_forms(names: Sequence[str]) -> None:
    """Add files or modules to those that `load_forms` imports, here and in processes that begin later."""
    known = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*known, *names]))


def load_forms() -> None:
    """Import what `HEEDFUL_FORMS` names, so that the forms in it are registered.

    Raises:
        FileNotFoundError: for a file that there is not.
        ImportError: for one that cannot be imported, naming it and the reason.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        try:
            if name.endswith(".py"):
                _load_file(name)
            else:
                importlib.import_module(name)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {name}") from None
        except Exception as error:
            raise ImportError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: str) -> None:
    name = "heedful_forms_" + os.path.splitext(os.path.basename(path))[0]
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise

"""Run by `make dist-check` in an environment that holds the wheel: it imports, computes and commands."""

import contextlib
import io
import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path


def main() -> None:
    """Fail loudly, or say what was tried."""
    import torch

    import heedful
    from heedful.cli import COMMANDS
    from heedful.cli import main as heedful_command

    home = Path(heedful.__file__).resolve()
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"{home} is not of the wheel"
    assert metadata.version("heedful") == heedful.__version__

    files = {str(file) for file in metadata.files("heedful") or []}
    foreign = [file for file in files if not file.startswith(("heedful/", "heedful-", "../../../bin/"))]
    assert not foreign, f"the wheel holds {foreign}"
    assert not [file for file in files if "goals" in file or "published" in file]
    assert "heedful/py.typed" in files

    layer = heedful.build("sas", score="selective", d_model=32, n_heads=4)
    layer(torch.randn(2, 40, 32)).sum().backward()

    for arguments in (["--help"], ["--version"], ["ls"], ["show", "sas"], ["bench"], ["doctor"]):
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            assert heedful_command(arguments) == 0, arguments
        assert shown.getvalue().strip()
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        heedful_command(["doctor", "--json"])
    assert json.loads(shown.getvalue())["heedful"]["folder"] == str(home.parent)

    with tempfile.TemporaryDirectory() as folder:  # the bundled text is in the wheel too
        small = (
            "--tokenizer bytes --d-model 16 --n-layers 1 --n-heads 2 --context 32 --batch-size 2 --steps 2"
        )
        assert heedful_command(["train", *small.split(), "--out", f"{folder}/run"]) == 0
        assert heedful_command(["generate", f"{folder}/run", "It is", "--max-new-tokens", "4"]) == 0
    print(f"heedful {heedful.__version__} from its wheel: {len(files)} files, {len(COMMANDS)} commands")


if __name__ == "__main__":
    main()

"""`heedful study`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from heedful.cli.errors import UsageError
from heedful.cli.parsing import flag, parse, positional
from heedful.errors import Interrupted
from heedful.screen import Column, spinner, table, text
from heedful.study.plan import DEFAULT_DATA, FOLDER, Scale, Study, load_study

if TYPE_CHECKING:
    from heedful.study.verdict import Verdict

DESCRIPTION = """Try a claim: train what it needs, several seeds of each arm, and say whether it holds.

    heedful study                          # the studies here, and what came out
    heedful study selective --workers 2    # run one, or go on with it
    heedful study selective --report       # write its page again from the raw data

A study is a file studies/NAME.toml: the claim, the effect looked for, the arms, the contrasts. Its results go to
results/NAME, its models to runs/NAME: in a checkout of heedful that adds to what is published there, and takes
over what another study there has trained. --out runs/again tries from nothing, models in runs/again/models.
Every run is kept as soon as it ends, and the same command goes on. The sweep of learning rates has a seed of its
own; seconds of a step are measured in turns before anything is trained. Both scales use a GPU where there is one;
the large one wants a large text, --data my.txt."""


def run(arguments: Sequence[str]) -> int:
    """Run a study, or list them."""
    values = parse(
        "study",
        DESCRIPTION,
        [
            positional("name", str, "", "of the study, or the path of its file; nothing: list them"),
            flag(
                "scale",
                Scale,
                "cpu",
                "cpu: ten minutes to some hours on two cores; gpu: an hour of a large one",
            ),
            flag(
                "workers",
                int,
                1,
                "runs at a time, each with its share of the cores; as many as cores are fastest",
            ),
            flag("ray", str | None, None, 'run on a Ray cluster: its address, "auto", or "local"'),
            flag("data", str | None, None, "train on this instead: a file, a folder or synthetic:TASK"),
            flag("seeds", int | None, None, "another number of seeds than the study's own, 2 or more"),
            flag("out", str | None, None, "another folder for the results than results/NAME: from nothing"),
            flag("models", str | None, None, "folder for the models; runs/NAME, or OUT/models, if left out"),
            flag("report", bool, False, "train nothing, write the page from the raw data there is"),
        ],
        arguments,
    )
    console = Console()
    if not values["name"]:
        return _list(console)
    for name, least in (("workers", 1), ("seeds", 2)):
        if values[name] is not None and values[name] < least:
            raise UsageError(f"--{name} must be {least} or more, got {values[name]}")
    study = load_study(values["name"], values["scale"], data=values["data"])
    suffix = "" if values["scale"] == "cpu" else f"-{values['scale']}"
    out = Path(values["out"] or Path("results") / f"{study.name}{suffix}")
    there = Path("runs") / f"{study.name}{suffix}" if values["out"] is None else out / "models"
    models = Path(values["models"] or there)
    with spinner(console, "loading transformers"):
        from heedful.study.report import sides, write_report
        from heedful.study.run import check_same, run_study
    if values["report"]:
        if not (out / "runs.jsonl").exists():
            raise FileNotFoundError(f"there are no results of {study.name} in {out}; run it first")
        if values["seeds"] is not None:
            raise UsageError(
                "--seeds says how many to train, and --report trains none; leave one of them out"
            )
        check_same(study, out)
        found = write_report(study, out, _again(values))
    else:
        _check_data(study)
        how = {name: values[name] for name in ("workers", "ray", "seeds")}
        how |= {"take_over": values["out"] is None, "again": _again(values)}
        try:
            found = run_study(study, out, models, console=console, **how)
        except Interrupted as stopped:
            raise Interrupted(f"{stopped}; the same command goes on") from None
    _show([(sides(v.contrast, "vs"), v) for v in found], study, console)
    print(f"written: {out / 'README.md'}, {out / 'figure.png'}")
    return 0


def _again(values: Mapping[str, Any]) -> str | None:
    """The command as it was given, for the page; None for a study that is where all are."""
    if values["out"] is None and not values["name"].endswith(".toml"):
        return None
    said = ["heedful", "study", values["name"]]
    said += ["--scale", values["scale"]] if values["scale"] != "cpu" else []
    for name in ("data", "out"):
        said += [f"--{name}", values[name]] if values[name] is not None else []
    return shlex.join(said)


def _check_data(study: Study) -> None:
    """Raise if an arm trains on a file or folder that is not there."""
    for settings in study.arms.values():
        ours = settings.data == DEFAULT_DATA or settings.data.startswith("synthetic:")
        if not ours and not Path(settings.data).exists():
            raise FileNotFoundError(
                f"the study {study.name} trains on {settings.data!r}, and there is no such file or folder here; "
                "name a text of your own: --data FOLDER"
            )


def _show(found: "Sequence[tuple[str, Verdict]]", study: Study, console: Console) -> None:
    """The verdicts on the screen, each with what is compared."""
    columns = [text("contrast"), Column("claimed"), Column("difference"), Column("seeds"), text("verdict")]
    rows = []
    for compared, v in found:
        d = v.difference
        interval = f"{d.estimate:+.4f}\n({d.low:+.4f} to {d.high:+.4f})"
        rows.append([escape(compared.replace("`", "")), v.contrast.claims, interval, str(v.seeds), v.says])
    if not rows:
        console.print("no verdict yet: no contrast has two seeds")
        return
    title = f"{study.metric}, 95 % intervals; the first contrast decides the verdict: {found[0][1].says}"
    console.print(table(columns, rows, title=title, width=console.width))


def _list(console: Console) -> int:
    paths = sorted(FOLDER.glob("*.toml"))
    if not paths:
        raise FileNotFoundError(f"there is no {FOLDER}/*.toml here; run it where the studies are")
    rows = []
    for path in paths:
        study = load_study(path.stem)
        rows.append([study.name, escape(study.title), _verdict(Path("results") / study.name)])
    columns = [text("study"), text("title"), text("verdict")]
    console.print(table(columns, rows, title="studies", width=console.width))
    console.print(
        "A verdict is that of the first contrast a study declares, not of all its claim: results/NAME/README.md "
        "has the claim and every contrast.",
        style="dim",
    )
    return 0


def _verdict(folder: Path) -> str:
    """As its page says, or how far it is."""
    page = folder / "README.md"
    if page.exists():
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("**Verdict: "):
                return line.removeprefix("**Verdict: ").partition("**")[0].rstrip(".")
    runs = folder / "runs.jsonl"
    if not runs.exists():
        return "a sweep, no verdict" if (folder / "sweep.jsonl").exists() else "not run"
    arms = {json.loads(line)["arm"] for line in runs.read_text(encoding="utf-8").splitlines()}
    return f"{len(arms)} arms begun"

"""What a study is: its file, read and checked before anything is trained."""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from heedful.attention.eviction import POLICIES
from heedful.comparison.matching import match_d_ff
from heedful.comparison.statistics import seeds_needed
from heedful.data.tasks import task_of
from heedful.forms import load_forms, name_forms
from heedful.ops.checks import did_you_mean
from heedful.study.values import BUDGETS, CONTRAST, check_complete, check_settings, check_values
from heedful.training.settings import TrainSettings

DEFAULT_DATA = TrainSettings.data
MOST_OF_DEFAULT_DATA = 10_000_000
"""Tokens: twenty times through it."""
FOLDER = Path("studies")
"""Where `heedful study NAME` looks for NAME.toml."""
Claim = Literal["lower", "higher", "equal"]
Metric = Literal["loss", "accuracy", "accuracy at 2x", "accuracy at 4x"]
Scale = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Contrast:
    """Two arms, and what the claim says of them."""

    arm: str
    against: str
    claims: Claim
    """What the metric of `arm` is, beside that of `against`; equal: within the effect."""
    says: str = ""
    """In words."""
    smaller: int = 1
    """How many times fewer tokens than its context `arm` holds; 1: all of them."""
    policy: str | None = None
    """Who goes from its cache; None: whichever policy is best there."""
    against_smaller: int = 1
    """`smaller`, of `against`."""
    against_policy: str | None = None
    """`policy`, of `against`."""
    metric: Metric | None = None
    """Accuracy at another length than the study's; None: the study's metric."""

    @property
    def of_caches(self) -> bool:
        """Whether small caches are compared."""
        return self.smaller > 1 or self.against_smaller > 1


@dataclass(frozen=True)
class Budgets:
    """Caches that trained models are measured with."""

    kept: tuple[int, ...]
    """Tokens a layer holds."""
    policies: Mapping[str, tuple[str, ...]]
    """By score: who goes."""
    arms: tuple[str, ...] | None = None
    """Whose caches; None: of all arms with such a score."""

    def has(self, arm: str, score: str) -> bool:
        """Whether the caches of an arm are measured."""
        return score in self.policies and (self.arms is None or arm in self.arms)


@dataclass(frozen=True)
class Study:
    """A claim, how it is tried, and how surely an effect would be found."""

    name: str
    title: str
    claim: str
    source: str
    """Who claims it."""
    metric: Metric
    effect: float
    """The difference looked for, declared before the runs."""
    spread: float
    """Standard deviation of the paired differences that was expected."""
    seeds: int
    rates: tuple[float, ...]
    """Learning rates tried for every arm, on a seed of their own."""
    arms: Mapping[str, TrainSettings]
    """What is trained, by name; the first is the baseline."""
    contrasts: tuple[Contrast, ...]
    """The first one decides the verdict."""
    lengths: tuple[int, ...] = ()
    """More numbers of steps for the baseline: the compute multiplier."""
    budgets: Budgets | None = None
    limits: str = ""
    """What the study cannot say."""
    x: str = ""
    """A field of the settings to draw the metric against; empty: an interval for each arm."""
    scale: Scale = "cpu"
    """Which of its sizes this is."""
    data: str | None = None
    """What it is trained on instead of what its file says."""

    @property
    def baseline(self) -> str:
        """The first arm."""
        return next(iter(self.arms))

    @property
    def needed(self) -> int:
        """Seeds that find the effect in four of five cases, at the expected spread."""
        return seeds_needed(self.effect, self.spread)


def load_study(name: str, scale: Scale = "cpu", folder: Path = FOLDER, data: str | None = None) -> Study:
    """Read a study.

    Args:
        name: of a file in `folder`, or the path of one.
        scale: which of its sizes.
        folder: where studies are.
        data: what to train on instead of what the study says.

    Raises:
        FileNotFoundError: if there is none of that name.
        ValueError: for a file that is no study, saying what is wrong where.
    """
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.toml"))
        have = f"studies there: {', '.join(known)}" if known else f"there is no {folder}/*.toml here"
        raise FileNotFoundError(f"there is no study {path}; {did_you_mean(name, known)}{have}")
    try:
        raw = _read(path)
        check_values(raw)
        name_forms([str(path.parent / form) for form in raw.get("forms", [])])
        load_forms()
        return _study(path.stem, raw, scale, data)
    except (ValueError, TypeError, KeyError, ImportError, FileNotFoundError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}") from None


def _read(path: Path) -> dict[str, Any]:
    """A file as it is; over the one that it says it is `like`, table by table."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    if (like := raw.pop("like", None)) is None:
        return raw
    if not isinstance(like, str):
        raise ValueError(f"like must be the path of a file, got {like!r}")
    base = path.parent / like
    if not base.is_file():
        raise FileNotFoundError(f"it is like {like!r}, and there is no {base}")
    return _over(tomllib.loads(base.read_text(encoding="utf-8")), raw)


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Two tables; what both say is said by `own`, and tables in them are joined likewise."""
    joined = {
        k: _over(base[k], v) for k, v in own.items() if isinstance(v, dict) and isinstance(base.get(k), dict)
    }
    return {**base, **own, **joined}


def _study(name: str, raw: dict[str, Any], scale: Scale, data: str | None) -> Study:
    own = {f.name for f in fields(Study)} - {"name", "arms", "scale", "data"}
    _check_known("a study", raw, {*own, "train", "scale", "arms", "forms"})
    for scaled in raw.get("scale", {}):
        _check_known(f"scale.{scaled}", _at(raw, scaled), {*own, "train", "arms"})
    check_values(_at(raw, scale))
    check_complete({**raw, **_at(raw, scale)})
    settings = {**raw.get("train", {}), **_at(raw, scale).get("train", {})}
    head = {
        **{k: v for k, v in raw.items() if k in own},
        **{k: v for k, v in _at(raw, scale).items() if k in own},
    }
    if data is not None:
        settings["data"] = data
    arms = _arms({**raw["arms"], **_at(raw, scale).get("arms", {})}, settings)
    _check_text(arms)
    if head["metric"] not in get_args(Metric):
        raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {head['metric']!r}")
    budgets = _budgets(head.pop("budgets", None), arms)
    contrasts = tuple(_contrast(c, arms, budgets, head["metric"]) for c in head.pop("contrasts"))
    compared = [dataclasses.replace(c, says="") for c in contrasts]
    if twice := [c for n, c in enumerate(compared) if c in compared[:n]]:
        raise ValueError(f"a contrast of {twice[0].arm!r} with {twice[0].against!r} stands there twice")
    for number in ("effect", "spread"):
        if not head[number] > 0:
            raise ValueError(f"{number} must be greater than 0, got {head[number]}")
    if head["seeds"] < 2:
        raise ValueError(f"seeds must be 2 or more, got {head['seeds']}")
    for many in ("rates", "lengths"):
        head[many] = tuple(head.get(many, ()))
    if not head["rates"] or min(head["rates"]) <= 0:
        raise ValueError(
            f"rates must name a learning rate at least, all greater than 0, got {list(head['rates'])}"
        )
    named = [f"{lr:g}" for lr in head["rates"]]
    if len(set(named)) < len(named):
        raise ValueError(f"rates has a learning rate twice, to six digits: {', '.join(named)}")
    baseline = next(iter(arms.values()))
    if taken := {f"{next(iter(arms))}-steps{n}" for n in head["lengths"]} & set(arms):
        raise ValueError(f"arm {min(taken)!r} has the name of a run of `lengths`; call it something else")
    if any(n < 1 or n == baseline.steps for n in head["lengths"]):
        raise ValueError(
            f"lengths are numbers of steps of 1 or more, other than those of the baseline ({baseline.steps}), got "
            f"{list(head['lengths'])}"
        )
    for metric in (head["metric"], *(c.metric for c in contrasts if c.metric)):
        _check_measured(metric, head.get("x", ""), arms)
    return Study(name=name, arms=arms, contrasts=contrasts, budgets=budgets, scale=scale, data=data, **head)


def _check_measured(metric: str, x: str, arms: Mapping[str, TrainSettings]) -> None:
    """Raise if the runs of an arm have no such metric, or nothing to draw it against."""
    for name, settings in arms.items():
        if metric != "loss" and not settings.data.startswith("synthetic:"):
            raise ValueError(
                f"metric {metric!r} is of synthetic tasks, and arm {name!r} trains on {settings.data!r}; use loss"
            )
        task = task_of(settings.data, settings.task_options)
        if task is not None and metric.startswith("accuracy at") and settings.positions == "learned":
            longer = task.fit(settings.context).times(
                int(metric.removeprefix("accuracy at ").removesuffix("x"))
            )
            most = settings.to_config(settings.vocab_size, settings.context).max_position_embeddings
            if longer.length > most:
                raise ValueError(
                    f"arm {name!r} has learned positions, {most} of them, and metric {metric!r} reads "
                    f"{longer.length} tokens; use rope or none, or another metric"
                )
        if x and not isinstance(getattr(settings, x, None), int | float):
            numbers = [f.name for f in fields(settings) if isinstance(getattr(settings, f.name), int | float)]
            raise ValueError(
                f"x must be a setting that is a number in every arm, got {x!r}; {did_you_mean(x, numbers)}"
                f"known: {', '.join(numbers)}"
            )


def _check_text(arms: Mapping[str, TrainSettings]) -> None:
    """Raise if a model would read the text that comes with heedful over and over."""
    for settings in arms.values():
        read = settings.steps * settings.batch_size * settings.context
        if settings.data == DEFAULT_DATA and read > MOST_OF_DEFAULT_DATA:
            raise ValueError(
                f"a run of it reads {read / 1e6:,.0f} M tokens, and {DEFAULT_DATA!r} has half a million; name a "
                "larger text with --data"
            )


def _at(raw: dict[str, Any], scale: Scale) -> dict[str, Any]:
    scales = raw.get("scale", {})
    _check_known("scale", scales, set(get_args(Scale)))
    if scale not in scales and scale != "cpu":
        raise ValueError(
            f"there is no [scale.{scale}] in it; leave --scale out: that size uses a GPU, too, where there is one"
        )
    return scales.get(scale, {})


def _arms(raw: dict[str, Any], common: dict[str, Any]) -> dict[str, TrainSettings]:
    """The settings of every arm; `match` and `to` even out its size with another arm's, by the SwiGLU."""
    arms: dict[str, TrainSettings] = {}
    known = {f.name for f in fields(TrainSettings)} - {"lr", "seed"}
    for name in ("lr", "seed"):
        if any(name in table for table in (common, *raw.values())):
            raise ValueError(
                f"{name} is none of a study's settings: every arm tries its `rates`, with as many seeds as "
                f"`seeds` says"
            )
    for name, values in raw.items():
        check_settings(f"arm {name!r}", {**common, **values})
        if not name or name.startswith(".") or any(c in name for c in "/\\"):
            raise ValueError(
                f"an arm's name is that of a folder, without / and not beginning with a dot, got {name!r}"
            )
        match, to = values.get("match"), values.get("to")
        if (match is None) != (to is None):
            raise ValueError(
                f"arm {name!r} needs `match` and `to`, both or none: which size, and of which arm"
            )
        own = {k: v for k, v in values.items() if k not in ("match", "to")}
        _check_known(f"arm {name!r}", {**common, **own}, known)
        merged = {**common, **own}
        for options in ("attention_options", "score_options", "task_options", "trainer"):
            if isinstance(common.get(options), dict) and options in own:
                merged[options] = {**common[options], **own[options]}
        try:
            settings = TrainSettings(**merged)
            if match is not None:
                settings = _matched(settings, arms[to], match)
        except KeyError:
            raise ValueError(f"arm {name!r} matches {to!r}, which is no arm before it") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"arm {name!r}: {error}") from None
        arms[name] = settings
    if len(arms) < 2:
        raise ValueError("a study needs two arms or more")
    return arms


def _matched(settings: TrainSettings, target: TrainSettings, by: Any) -> TrainSettings:
    if by not in ("params", "flops"):
        raise ValueError(f"match must be params or flops, got {by!r}")
    own, other = (s.to_decoder_config(s.vocab_size, s.context) for s in (settings, target))
    return dataclasses.replace(settings, d_ff=match_d_ff(own, other, by, settings.context))


def _contrast(
    raw: dict[str, Any], arms: Mapping[str, TrainSettings], budgets: Budgets | None, metric: str
) -> Contrast:
    _check_known("a contrast", raw, {f.name for f in fields(Contrast)})
    check_values(raw, CONTRAST)
    contrast = Contrast(**raw)
    for arm in (contrast.arm, contrast.against):
        if arm not in arms:
            raise ValueError(f"a contrast names {arm!r}; {did_you_mean(arm, arms)}arms: {', '.join(arms)}")
    if contrast.claims not in get_args(Claim):
        raise ValueError(f"claims must be one of {', '.join(get_args(Claim))}, got {contrast.claims!r}")
    for name in ("smaller", "against_smaller"):
        value = getattr(contrast, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
    if contrast.metric is not None:
        lengths = [name for name in get_args(Metric) if name != "loss"]
        if metric == "loss" or contrast.metric not in lengths or contrast.of_caches:
            raise ValueError(
                "metric of a contrast is for full caches in studies of accuracy, and one of "
                f"{', '.join(lengths)}; got {contrast.metric!r}"
            )
    if contrast.of_caches:
        _check_caches(contrast, arms, budgets, metric)
    one = (contrast.arm, contrast.smaller, contrast.policy)
    if one == (contrast.against, contrast.against_smaller, contrast.against_policy):
        raise ValueError(f"a contrast is of {contrast.arm!r} against itself; name two arms, or two caches")
    return contrast


def _check_caches(
    contrast: Contrast, arms: Mapping[str, TrainSettings], budgets: Budgets | None, metric: str
) -> None:
    """Raise if the caches that a contrast compares are not measured."""
    if metric not in ("loss", "accuracy"):
        raise ValueError(f"caches are compared by loss or accuracy, and metric is {metric!r}")
    for arm, smaller, policy in (
        (contrast.arm, contrast.smaller, contrast.policy),
        (contrast.against, contrast.against_smaller, contrast.against_policy),
    ):
        what = f"a contrast compares caches of {arm!r}"
        if budgets is None or not budgets.has(arm, arms[arm].score):
            raise ValueError(f"{what}, which [budgets] does not measure")
        kept = arms[arm].context // smaller
        if smaller > 1 and kept not in budgets.kept:
            raise ValueError(f"{what} with {kept} tokens; kept has {', '.join(map(str, budgets.kept))}")
        if policy is not None and policy not in budgets.policies[arms[arm].score]:
            raise ValueError(f"{what} under {policy!r}, which is none of its policies")


def _budgets(raw: dict[str, Any] | None, arms: Mapping[str, TrainSettings]) -> Budgets | None:
    if raw is None:
        return None
    _check_known("budgets", raw, {f.name for f in fields(Budgets)})
    check_values(raw, BUDGETS)
    scores = {settings.score for settings in arms.values()}
    for score, names in raw["policies"].items():
        if score not in scores:
            raise ValueError(
                f"budgets have policies of score {score!r}; {did_you_mean(score, scores)}no arm has it"
            )
        _check_known("eviction", dict.fromkeys(names), set(POLICIES))
    policies = {score: tuple(names) for score, names in raw["policies"].items()}
    if "arms" not in raw:
        return Budgets(tuple(raw["kept"]), policies)
    _check_known("a study", dict.fromkeys(raw["arms"]), set(arms))
    return Budgets(tuple(raw["kept"]), policies, tuple(raw["arms"]))


def _check_known(what: str, given: Mapping[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(
                f"{what} has no {name!r}; {did_you_mean(name, known)}known: {', '.join(sorted(known))}"
            )

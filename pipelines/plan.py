"""`dit plan`: which stages a study would run, and about how long they would take, before anything starts."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.files import json_text

if TYPE_CHECKING:
    from dit.config import Params
    from dit.design import Design

DURATIONS = Path(".scratch/durations.csv")
"""How long each stage took that the flow ran: one line with the kind of stage and the seconds."""
START_SECONDS = 6.0
"""How long a stage takes to start as a Python of its own, with DVC's reading and writing of its files. If no earlier stage of a
kind tells, a whole stage counts as this. Measured in a default study on two cores (`make bench BENCH=stages`)."""
WARM_SECONDS = 0.7
"""How long a training run takes to start if it is forked from the warm server; measured by `make bench BENCH=study`."""
DIAGNOSED = 0.1
"""The fraction of training time that validation and diagnoses add; measured by `make bench BENCH=diagnostics`."""


@dataclass(frozen=True)
class Row:
    """The stages of one kind: how many will run, how many are up to date, and the seconds of one (None if unknown)."""

    kind: str
    to_run: int
    up_to_date: int
    seconds: float | None
    source: str


@dataclass(frozen=True)
class Plan:
    """What a study would run."""

    params: Params
    rows: list[Row]
    parallel: int
    memory: int
    """The most bytes that one training run needs."""

    @property
    def seconds(self) -> float:
        """Wall-clock time with `parallel` stages at once; stages before and after the runs count one after another."""
        work = {row.kind: row.to_run * (row.seconds or START_SECONDS) for row in self.rows}
        alone = sum(work.get(kind, 0.0) for kind in ("design", "images", "autoencoder", "latents", "features", "compare"))
        return alone + (sum(work.values()) - alone) / self.parallel


def note_duration(stage: str, seconds: float, root: Path = Path()) -> None:
    """Remember how long a stage took, for later plans."""
    path = root / DURATIONS
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{stage.partition('@')[0]},{seconds:.1f}\n")


def durations() -> dict[str, list[float]]:
    """The seconds of earlier stages that the flow noted, by kind."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in DURATIONS.read_text().splitlines() if DURATIONS.exists() else ():
        kind, _, seconds = line.partition(",")
        try:
            found[kind].append(float(seconds))
        except ValueError:  # a line that a kill cut short
            continue
    return found


def plan(params: Params, done: Mapping[str, bool], workers: int | None) -> Plan:
    """The plan of a study; `done` says for each stage whether it is up to date. Times a few training steps of each network."""
    from pipelines.device_pool import device_pool

    remembered = durations()
    waiting: Counter[str] = Counter()
    fresh: Counter[str] = Counter()
    for name, finished in done.items():
        (fresh if finished else waiting)[name.partition("@")[0]] += 1
    seconds, memory = _training(params, [name for name, finished in done.items() if not finished])
    rows = []
    for kind in dict.fromkeys(name.partition("@")[0] for name in done):
        if kind == "train" and waiting[kind]:
            rows.append(Row(kind, waiting[kind], fresh[kind], seconds / waiting[kind], "some steps trained now"))
        else:
            known = remembered.get(kind, [])
            source = f"earlier stages: {len(known)}" if known else "no earlier stage"
            rows.append(Row(kind, waiting[kind], fresh[kind], statistics.median(known) if known else None, source))
    return Plan(params, rows, device_pool(params, workers).max_parallel, memory)


def _training(params: Params, names: Iterable[str]) -> tuple[float, int]:
    """The total seconds of the training runs `names`, and the most memory that one of them needs."""
    from dit.design import design
    from dit.training.estimate import estimate
    from pipelines import warm

    runs = design(params.study).by_name
    start = WARM_SECONDS if warm.wanted() else START_SECONDS
    total, memory, known = 0.0, 0, {}
    for name in names:
        kind, _, key = name.partition("@")
        if kind != "train":
            continue
        here = params.with_values(runs[key].setting.levels)
        cost = repr([here.model, here.images.size, here.autoencoder.downsample, here.diffusion, _costly(here)])
        if cost not in known:
            known[cost] = estimate(here, runs[key].strategy)
            memory += known[cost].memory  # growth of this process's peak: the sum is what the largest network needs
        total += start + here.train.steps * known[cost].seconds_per_step * (1 + DIAGNOSED)
    return total, memory


def _costly(params: Params) -> dict[str, Any]:
    """The parameters on which the time of a training step depends."""
    return params.train.model_dump(
        include={"batch_size", "optimizer", "precision", "backend", "threads", "device", "processes"}
    )


def up_to_date(root: Path, params: Params) -> dict[str, bool]:
    """For each stage, whether `dvc.lock` records the inputs that it has with `params`, and its output is in the folder."""
    from dvc.utils.serialize import load_yaml

    from pipelines import design

    lock = root / "dvc.lock"
    recorded: dict[str, Any] = load_yaml(lock)["stages"] if lock.exists() else {}
    made: dict[str, str] = {}
    same: dict[str, bool] = {}
    for stage, items in design.items(params).items():
        for key, item in items.items():
            name = stage if stage == "compare" else f"{stage}@{key}"
            identity = json_text(design.identity(params.with_values(item.setting.levels), item))
            ran_with = {dep["path"]: dep.get("md5") for dep in recorded.get(name, {}).get("deps", [])}
            own = ran_with.get(item.identity_file.as_posix()) == hashlib.md5(identity.encode()).hexdigest()
            if reference := item.inputs.get("reference"):
                own = own and ran_with.get(reference) == _md5(Path(reference))
            above = [same[made[out]] for out in made for path in item.inputs.values() if _overlap(out, path)]
            same[name] = own and all(above) and (root / item.out).exists()
            if item.out:
                made[item.out] = name
    same["compare"] = all(same.values())
    return same


@cache
def _md5(path: Path) -> str | None:
    """The MD5 digest of a file, as DVC records it; None if there is no file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _overlap(out: str, path: str) -> bool:
    """Whether `path` and `out` are the same, or one is inside the other."""
    return Path(path).is_relative_to(out) or Path(out).is_relative_to(path)


def show(found: Plan) -> None:
    """Print a plan as a table and a few sentences."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from dit.design import design

    study = found.params.study
    runs = design(study)
    levels = "; ".join(f"{key}: {', '.join(words)}" for key, words in _levels(runs).items())
    counts = " and ".join(
        f"{n} {noun if n == 1 else plural}"
        for n, noun, plural in ((len(study.strategies), "strategy", "strategies"), (len(study.seeds), "seed", "seeds"))
    )
    print(f"study '{study.name}': {len(runs.runs)} runs of {counts}")
    print(f"factors: {levels or 'none'}")
    print(f"declared comparisons with {study.baseline}: {', '.join(study.primary) or 'none'}; samples: {study.sample}")
    table = Table(box=SIMPLE)
    for title in ("stage", "to run", "up to date", "seconds each", "known from"):
        table.add_column(title, justify="left" if title in ("stage", "known from") else "right")
    for row in found.rows:
        one = "?" if row.seconds is None else f"{row.seconds:.0f}"
        table.add_row(row.kind, str(row.to_run), str(row.up_to_date), one, row.source if row.to_run else "")
    Console().print(table)
    if not any(row.to_run for row in found.rows):
        print("nothing to run: all is up to date")
        return
    print(
        f"about {_time(found.seconds)}, with {found.parallel} stages at a time; a training run needs "
        f"{found.memory / 2**30:.2g} GiB of memory"
    )
    if unknown := [row.kind for row in found.rows if row.to_run and row.seconds is None]:
        print(f"no earlier stage tells how long these take, so each counts as {START_SECONDS:.0f} s: {', '.join(unknown)}")


def _levels(runs: Design) -> dict[str, list[str]]:
    """The levels of each factor in words: a list or a section has its own name, or else the name of its setting."""
    found: dict[str, dict[str, None]] = {}
    for setting in runs.settings():
        for key, level in setting.levels.items():
            named = setting.named.get(key, "").partition("=")[2] or setting.name
            found.setdefault(key, {})[named if isinstance(level, (list, dict)) else str(level)] = None
    return {key: list(words) for key, words in found.items()}


def _time(seconds: float) -> str:
    hours, minutes = divmod(max(round(seconds / 60), 1), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def command(
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", envvar="DIT_SET", help="Replace a value of params.yaml.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", envvar="DIT_PROFILE", help="Use the values of profiles/NAME.yaml.")
    ] = None,
    workers: Annotated[
        str | None, typer.Option(metavar="NUMBER", envvar="DIT_WORKERS", help="How many stages run at the same time.")
    ] = None,
) -> None:
    """Show what the study would run, what is up to date, and about how long it would take."""
    from pipelines import design, experiments
    from pipelines.overrides import assignments, whole_number

    root, at_once = Path.cwd(), whole_number("WORKERS", workers)
    given = experiments.profile(root, profile) if profile else {}
    overrides = {**given, **assignments(set_ or [])}
    params = experiments.parameters(root, overrides)
    if not overrides:
        design.write(root, params)
    show(plan(params, up_to_date(root, params), at_once))

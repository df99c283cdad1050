"""What `dit check`, `dit init` and `dit wakeup` print: a parameter file in words, and tables of strategies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table
from torch import nn

from dit import config, design, init, models, preflight
from dit.analysis import tables
from dit.analysis.wakeup import by_kind, not_predicted, predict
from dit.config import Params
from dit.data.classes import num_classes
from dit.errors import ConfigError, did_you_mean
from dit.init import Strategy
from dit.init.strategy import claims
from dit.preflight import Finding
from dit.terminal import plain

FEW = 3
"""How many strategies fit side by side on a terminal of 80 columns."""


def check(params: Path) -> str:
    """Check a parameter file and return what its study would do. Raises `ConfigError`."""
    loaded = config.load(params)
    study = loaded.study
    every_role = loaded.roles
    for name, strategy in loaded.strategies.items():
        try:
            claims(strategy, every_role)
            if name in study.strategies:
                strategy.verify()
        except ConfigError as error:
            if name in study.strategies:
                raise ConfigError(f"{params}: strategies.{name}.{error}") from None
            print(f"not in the study, and does not fit {loaded.model.name}: strategies.{name}.{error}", file=sys.stderr)
    design.check(loaded, str(params))
    planned = design.design(study)
    factors = f" x {len(planned.settings())} settings of {', '.join(planned.factors)}" if planned.factors else ""
    return (
        f"{plain(str(params))} is valid: study '{plain(study.name)}', {len(study.strategies)} strategies{plain(factors)} x "
        f"{len(study.seeds)} seeds = {len(planned.runs)} runs, {loaded.model.name} on latents of "
        f"{loaded.autoencoder.latent_channels} x "
        f"{loaded.latent_size} x {loaded.latent_size}, {loaded.train.steps} steps of {loaded.train.batch_size}"
    )


def findings(params: Path) -> list[Finding]:
    """What the pre-flight finds in everything that a parameter file names, with the findings of checks by other packages."""
    loaded = config.load(params)
    others = [point.load()(Path.cwd(), loaded) for point in entry_points(group="dit.checks")]
    return preflight.merged(preflight.check(loaded, str(params)), list(chain.from_iterable(others)))


def findings_table(findings: Sequence[Finding]) -> Table:
    """A table of all findings: errors first, then warnings."""
    table = Table(box=SIMPLE, title="Opened, counted and estimated", title_justify="left")
    for column in ("", "what", "where", "found", "expected"):
        table.add_column(column, overflow="fold")
    order = {"error": 0, "warning": 1, "fine": 2}
    for finding in sorted(findings, key=lambda each: order[each.severity]):
        row = (finding.severity, finding.what, finding.where, finding.found, finding.expected)
        table.add_row(*map(plain, row))
    return table


def library(params: Path) -> Table:
    """The strategies of the library and a parameter file, with what each does and its source."""
    table = Table("strategy", "what it does", "source", title="Strategies", title_justify="left", show_lines=True)
    for name, strategy in config.load(params).strategies.items():
        table.add_row(name, plain(strategy.description), plain(strategy.source))
    table.columns[0].no_wrap = True
    return table


def one(params: Path, strategy: str, model: str | None, seed: int, every: bool) -> Table:
    """The rule and the values that a strategy gives each role; blocks with equal rules share a row unless `every` is true."""
    loaded = config.load(params)
    chosen = _strategy(loaded, strategy, params, model)
    network = init.apply(loaded.network({"num_classes": num_classes(loaded.images)}, model), chosen, seed)
    title, caption = f"{strategy}: {plain(chosen.description)}", plain(chosen.source)
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("role", no_wrap=True)
    for column in ("shape", "rule"):
        table.add_column(column)
    for column in ("mean", "std", "zero"):
        table.add_column(column, justify="right")
    for row in tables.rows(network, chosen, every):
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.role, shape, row.rule, f"{row.mean:.4f}", f"{row.std:.4f}", f"{row.zero:.0%}")
    return table


def difference(params: Path, names: tuple[str, str], model: str | None, every: bool) -> Table:
    """What the second strategy draws differently from the first."""
    loaded = config.load(params)
    before, after = (_strategy(loaded, name, params, model) for name in names)
    classes = num_classes(loaded.images)
    network = loaded.skeleton(model, classes)
    changes = tables.changes(network, before, after, every)
    changed = sum(change.parameters for change in changes)
    total = sum(weight.numel() for weight in network.parameters())  # as the audit and the report count them
    of = f"{changed:,} of {total:,} parameters, with {classes} classes, are drawn differently"
    table = Table(title=f"{names[0]} -> {names[1]}: {of}", title_justify="left")
    table.add_column("role", no_wrap=True)
    for column in names:
        table.add_column(column)
    table.add_column("parameters", justify="right")
    for change in changes:
        table.add_row(change.role, change.before, change.after, f"{change.parameters:,}")
    return table


def schedules(params: Path, strategies: Sequence[str], model: str | None, steps: int) -> Table:
    """The step from which each kind of weight receives a gradient, predicted for `strategies`, or for all that fit if empty."""
    loaded = config.load(params)
    network = loaded.skeleton(model)
    if reason := not_predicted(network, loaded.train.optimizer):
        raise ConfigError(f"{reason} Stage `analyse` measures the schedule")
    chosen = {each: _strategy(loaded, each, params, model) for each in strategies or _fitting(loaded, network)}
    predicted = {each: predict(strategy, network, steps, loaded.train.optimizer) for each, strategy in chosen.items()}
    found = {each: by_kind(schedule) for each, schedule in predicted.items() if schedule is not None}
    kinds = list(next(iter(found.values())))
    few = len(found) <= FEW
    table = Table(title="First optimiser step with a gradient, counted from 0", title_justify="left", box=SIMPLE)
    table.add_column("kind of weight" if few else "strategy", no_wrap=True)
    for column in found if few else map(_broken, kinds):
        table.add_column(column, justify="right")
    if few:
        for kind in kinds:
            table.add_row(kind, *(_step(schedule[kind]) for schedule in found.values()))
    else:
        for each, schedule in found.items():
            table.add_row(each, *map(_step, schedule.values()))
    return table


def _strategy(loaded: Params, name: str, params: Path, network: str | None) -> Strategy:
    """The strategy called `name`. Raises `ConfigError` if it is unknown or does not fit the network."""
    if name not in loaded.strategies:
        hint = did_you_mean(name, loaded.strategies) or f"; expected one of {', '.join(loaded.strategies)}"
        raise ConfigError(f"{params}: unknown strategy '{name}'{hint}")
    every_role = models.roles(loaded.skeleton(network))
    try:
        claims(loaded.strategies[name], every_role)
    except ConfigError as error:
        raise ConfigError(f"{params}: strategies.{name}.{error}") from None
    return loaded.strategies[name]


def _fitting(loaded: Params, network: nn.Module) -> list[str]:
    """The strategies whose rules fit the network; other strategies may be written for another network."""
    found, every_role = [], models.roles(network)
    for name, strategy in loaded.strategies.items():
        with suppress(ConfigError):
            claims(strategy, every_role)
            found.append(name)
    return found


def _step(step: int | None) -> str:
    return "never" if step is None else str(step)


def _broken(kind: str) -> str:
    """A kind of weight as the heading of a narrow column."""
    short = kind.replace("modulation", "mod").replace("projection", "proj").replace("timestep", "time")
    return short.replace(".", "\n").replace("_", "\n")

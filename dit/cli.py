"""The console script `dit`: look at parameters, roles and initialisations, and continue runs that were kept."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import wraps
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn

from dit import config, design, init, models, preflight
from dit.analysis import tables
from dit.analysis.wakeup import by_kind, not_predicted, predict
from dit.config import Params
from dit.errors import ConfigError, UserError
from dit.exchange import commands, measuring
from dit.init import Strategy
from dit.init.strategy import claims
from dit.preflight import Finding
from dit.terminal import plain

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ParamsFile = Annotated[Path, typer.Option("--params", help="The parameter file.")]
CLASSES_SHOWN = 1000
"""Classes of the published models, for a table that has no data set."""


@contextmanager
def _user_errors_shown() -> Iterator[None]:
    """Print a user's error as one message and exit with 2. Of processes that torchrun started, the first tells."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def check(params: ParamsFile = Path("params.yaml")) -> None:
    """Check a parameter file, and say what the study would do."""
    with _user_errors_shown():
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
        others = [point.load()(Path.cwd(), loaded) for point in entry_points(group="dit.checks")]
        findings = [*preflight.check(loaded, str(params)), *chain.from_iterable(others)]
        _show(_findings_table(findings))
        if wrong := preflight.errors(findings):
            raise ConfigError("\n".join(f"{params}: {finding}" for finding in wrong))
        planned = design.design(study)
        factors = f" x {len(planned.settings())} settings of {', '.join(planned.factors)}" if planned.factors else ""
        print(
            f"{plain(str(params))} is valid: study '{plain(study.name)}', {len(study.strategies)} strategies{plain(factors)} x "
            f"{len(study.seeds)} seeds = {len(planned.runs)} runs, {loaded.model.name} on latents of "
            f"{loaded.autoencoder.latent_channels} x "
            f"{loaded.latent_size} x {loaded.latent_size}, {loaded.train.steps} steps of {loaded.train.batch_size}"
        )


def _findings_table(findings: Sequence[Finding]) -> Table:
    """What was opened, what is wrong first."""
    table = Table(box=SIMPLE, title="Opened, counted and estimated", title_justify="left")
    for column in ("", "what", "where", "found", "expected"):
        table.add_column(column, overflow="fold")
    order = {"error": 0, "warning": 1, "fine": 2}
    for finding in sorted(findings, key=lambda each: order[each.severity]):
        row = (finding.severity, finding.what, finding.where, finding.found, finding.expected)
        table.add_row(*map(plain, row))
    return table


@app.command("init")
def show_init(
    strategy: Annotated[str | None, typer.Option(metavar="NAME", help="Show what this strategy gives every role.")] = None,
    diff: Annotated[
        tuple[str, str], typer.Option(metavar="A B", help="Show what strategy B draws differently from strategy A.")
    ] = ("", ""),
    name: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="A network such as DiT-S/2. [default: the study's]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the values that --strategy shows.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="Show every block, also where blocks have the same rule.")] = False,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Show what strategies do: the library, one strategy's rule and values for each role, or how two strategies differ.

    Without an option: the strategies of the parameter file, with what they are and where they come from.
    """
    with _user_errors_shown():
        loaded = config.load(params)
        if strategy and any(diff):
            raise ConfigError("--strategy and --diff are two questions; give one of them")
        if strategy:
            table = _strategy_table(loaded, _strategy(loaded, strategy, params, name), name, seed, every)
            table.title = f"{strategy}: {table.title}"
        elif any(diff):
            table = _diff_table(loaded, [_strategy(loaded, each, params, name) for each in diff], diff, name, every)
        else:
            table = _library(loaded)
    _show(table)


def _show(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False).print(table)


def _strategy(loaded: Params, name: str, params: Path, network: str | None) -> Strategy:
    """The strategy of that name, if it fits the network."""
    if name not in loaded.strategies:
        near = get_close_matches(name, loaded.strategies, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{params}: unknown strategy '{name}'{hint}; expected one of {', '.join(loaded.strategies)}")
    every_role = models.roles(loaded.skeleton(network))
    try:
        claims(loaded.strategies[name], every_role)
    except ConfigError as error:
        raise ConfigError(f"{params}: strategies.{name}.{error}") from None
    return loaded.strategies[name]


def _fitting(loaded: Params, network: nn.Module) -> list[str]:
    """The strategies whose rules fit the network; some may be written for another."""
    found, every_role = [], models.roles(network)
    for name, strategy in loaded.strategies.items():
        with suppress(ConfigError):
            claims(strategy, every_role)
            found.append(name)
    return found


def _library(loaded: Params) -> Table:
    table = Table("strategy", "what it does", "source", title="Strategies", title_justify="left", show_lines=True)
    for name, strategy in loaded.strategies.items():
        table.add_row(name, plain(strategy.description), plain(strategy.source))
    table.columns[0].no_wrap = True
    return table


def _strategy_table(loaded: Params, strategy: Strategy, name: str | None, seed: int, every: bool) -> Table:
    network = init.apply(loaded.network({"num_classes": CLASSES_SHOWN}, name), strategy, seed)
    title, caption = plain(strategy.description), plain(strategy.source)
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("role", no_wrap=True)
    for column in ("shape", "rule"):
        table.add_column(column)
    for column in ("mean", "std", "zero"):
        table.add_column(column, justify="right")
    for row in tables.rows(network, strategy, every):
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.role, shape, row.rule, f"{row.mean:.4f}", f"{row.std:.4f}", f"{row.zero:.0%}")
    return table


def _diff_table(loaded: Params, strategies: Sequence[Strategy], names: Sequence[str], name: str | None, every: bool) -> Table:
    network = loaded.skeleton(name, CLASSES_SHOWN)
    before, after = strategies
    changes = tables.changes(network, before, after, every)
    changed = sum(change.parameters for change in changes)
    total = sum(weight.numel() for weight in network.parameters())  # as the audit and the report count them
    of = f"{changed:,} of {total:,} parameters, with {CLASSES_SHOWN} classes, are drawn differently"
    table = Table(title=f"{names[0]} -> {names[1]}: {of}")
    table.title_justify = "left"
    table.add_column("role", no_wrap=True)
    for column in names:
        table.add_column(column)
    table.add_column("parameters", justify="right")
    for change in changes:
        table.add_row(change.role, change.before, change.after, f"{change.parameters:,}")
    return table


FEW = 3
"""Strategies that a terminal of 80 columns has room for side by side."""


@app.command()
def wakeup(
    strategies: Annotated[
        list[str] | None, typer.Argument(metavar="[STRATEGY]...", help="Strategies of the parameter file. [default: all]")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="A network such as DiT-S/2. [default: the study's]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps to look at.")] = 5,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Predict, without running anything, from which optimiser step on each kind of weight receives a gradient."""
    with _user_errors_shown():
        loaded = config.load(params)
        network = loaded.skeleton(name)
        if reason := not_predicted(network, loaded.train.optimizer):
            raise ConfigError(f"{reason} Stage `analyse` measures the schedule")
        chosen = {each: _strategy(loaded, each, params, name) for each in strategies or _fitting(loaded, network)}
        predicted = {each: predict(strategy, network, steps, loaded.train.optimizer) for each, strategy in chosen.items()}
        schedules = {each: by_kind(schedule) for each, schedule in predicted.items() if schedule is not None}
    kinds = list(next(iter(schedules.values())))
    few = len(schedules) <= FEW
    table = Table(title="First optimiser step with a gradient, counted from 0", title_justify="left", box=SIMPLE)
    table.add_column("kind of weight" if few else "strategy", no_wrap=True)
    for column in schedules if few else map(_broken, kinds):
        table.add_column(column, justify="right")
    if few:
        for kind in kinds:
            table.add_row(kind, *(_step(schedule[kind]) for schedule in schedules.values()))
    else:
        for each, schedule in schedules.items():
            table.add_row(each, *map(_step, schedule.values()))
    _show(table)


def _step(step: int | None) -> str:
    return "never" if step is None else str(step)


def _broken(kind: str) -> str:
    """A kind of weight as the heading of a narrow column."""
    short = kind.replace("modulation", "mod").replace("projection", "proj").replace("timestep", "time")
    return short.replace(".", "\n").replace("_", "\n")


@app.command()
def audit(
    target: Annotated[str, typer.Argument(help="What to audit: see docs/audit.md.", metavar="TARGET")],
    settings: Annotated[str, typer.Option("--config", help="Constructor arguments, as JSON or as a JSON file.")] = "{}",
    name: Annotated[str | None, typer.Option("--model", help="For a strategy: a network. [default: the study's]")] = None,
    weights: Annotated[Path | None, typer.Option(help="For a function: a file or directory that fills its network.")] = None,
    key: Annotated[str, typer.Option(help="Of a file: where in it the weights are, such as ema. [default: found]")] = "",
    prefix: Annotated[str | None, typer.Option(help="Of a file: what stands before names. [default: found]")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Of a file: tensors to leave out, such as 'projectors.*'.")] = None,
    variant: Annotated[str, typer.Option(help="Of a diffusers directory: which weights, such as fp16.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Optimiser steps to watch.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of a network that is built here.")] = 0,
    expect: Annotated[str | None, typer.Option(help="Exit with 1 where the network is something else.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Find out how a network is initialised, from what it does.

    TARGET is diffusers:ClassName, strategy:NAME, a checkpoint, a diffusers directory, or package.module:function, which returns
    (model, batch) or (model, batch, loss).
    """
    from dit.audit import audit as run_audit, targets
    from dit.audit.expectations import known
    from dit.audit.files import Reading

    with _user_errors_shown():
        expected = known(expect) if expect else None
        reading = Reading(key, prefix, tuple(ignore or ()), variant)
        config_given = targets.read_config(settings)
        found = targets.load(target, config_given, model_name=name, seed=seed, params=params, weights=weights, reading=reading)
        report = run_audit(found.model, found.batch, found.loss, steps=steps, source=found.source)
    if as_json:
        print(json.dumps(report.model_dump(mode="json"), indent=2))  # in ASCII, so that a terminal acts on nothing in it
    else:
        Console(width=None if sys.stdout.isatty() else 100).print(report)
    reasons = report.failures(expected) if expected else []
    if reasons:
        print(plain(f"expected {expected}, but {'; '.join(reasons)}"), file=sys.stderr)
        raise typer.Exit(1)


@app.command("resume-from")
def resume_from(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run such as adaln_zero-0, or a folder with a checkpoint.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Of the checkpoint, where several are kept.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="What to change, such as train.precision=fp32.")
    ] = None,
    several: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="'NAME: KEY=VALUE, ...'", help="One of several continuations, compared at the end."),
    ] = None,
    control: Annotated[bool, typer.Option(help="Beside variants, also continue the run as it was.")] = True,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to train.")] = 500,
    output: Annotated[Path | None, typer.Option(help="A new folder for the tables; without it, none are written.")] = None,
    latents: Annotated[Path | None, typer.Option(help="Where the run's latents are, if they have moved.")] = None,
    scratch: Annotated[Path, typer.Option(help="The folder in which runs keep their checkpoints.")] = Path(".scratch"),
) -> None:
    """Continue a run from a kept checkpoint under other parameters, to find what made it collapse: see docs/stability.md.

    Without RUN, list the checkpoints that are kept.
    """
    from dit.continuation.go_on import go_on
    from dit.continuation.request import find, variants
    from dit.continuation.results import comparison, listing

    with _user_errors_shown():
        if run is None:
            _show(listing(scratch))
            return
        kept = find(run, scratch, step)
        chosen = variants(kept, changes or [], several or [], control)
        results = go_on(kept, chosen, steps, output, latents)
    if len(results) > 1:
        _show(comparison(results))


def _with_errors_shown(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with errors of the user as one message."""

    @wraps(command)
    def shown(*arguments: Any, **options: Any) -> None:
        with _user_errors_shown():
            command(*arguments, **options)

    return shown


for each in (commands.sample, commands.export, measuring.evaluate, measuring.reference):
    app.command(each.__name__)(_with_errors_shown(each))


def _add_commands() -> None:
    """Add the commands that other installed packages offer, such as `dit plan` of the workflow."""
    for point in entry_points(group="dit.commands"):
        app.command(point.name)(point.load())


_add_commands()

if __name__ == "__main__":
    app()

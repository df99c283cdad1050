"""Plan and run studies, and start MLflow and Prefect. `make` calls these commands: see `make help`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dit.errors import UserError
from dit.terminal import plain
from pipelines import disk, mlflow_store, plan, services
from pipelines.overrides import assignments, whole_number
from pipelines.redaction import redacted, shown


class Engine(StrEnum):
    """What runs the stages of a study."""

    LOCAL = "local"
    RAY = "ray"


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


SET = typer.Option(
    "--set",
    metavar="KEY=VALUE",
    envvar="DIT_SET",
    help="Replace a value of params.yaml, such as train.steps=300; the study then runs as an isolated experiment.",
)
TARGETS = typer.Argument(
    envvar="DIT_TARGETS", help="Run only these stages and the stages that they need, such as train (default: all)."
)
PROFILE = typer.Option(
    metavar="NAME",
    envvar="DIT_PROFILE",
    help="Use the values of profiles/NAME.yaml, such as gpu; the study then runs as an isolated experiment.",
)
WORKERS = typer.Option(
    metavar="NUMBER",
    envvar="DIT_WORKERS",
    help="How many stages run at the same time (default: as many as the machine has room for).",
)
ENGINE = typer.Option(
    envvar="DIT_ENGINE",
    help="Where stages run: local; or ray, on the cluster at RAY_ADDRESS or else on this machine (docs/cluster.md).",
)


app.command("plan")(plan.command)


@app.command()
def study(
    set_: Annotated[list[str] | None, SET] = None,
    targets: Annotated[list[str] | None, TARGETS] = None,
    workers: Annotated[str | None, WORKERS] = None,
    profile: Annotated[str | None, PROFILE] = None,
    engine: Annotated[Engine, ENGINE] = Engine.LOCAL,
) -> None:
    """Run all stages of the study that are not up to date, as a Prefect flow, and add its runs to MLflow."""
    from pipelines import up_to_date  # imports PyTorch, which `up` and `down` do not need

    overrides, at_once = assignments(set_ or []), whole_number("WORKERS", workers)
    disk.check(Path.cwd())
    if not overrides and not profile and (found := up_to_date.nothing_to_do(Path.cwd(), targets)):
        _tell_of_end("\n".join(found))
        return
    server = services.prefect_server(os.environ)
    os.environ.update(server.environment)
    from pipelines import experiments, targets as stages

    given = experiments.profile(Path.cwd(), profile) if profile else {}
    params = experiments.parameters(Path.cwd(), {**given, **overrides}, here=engine is Engine.LOCAL)
    if targets:
        stages.check(targets, stages.names(Path.cwd(), params))
    from pipelines import flows  # with Prefect, which takes seconds to import: what is wrong with the parameters is said before
    from pipelines.stage_task import LOGGER

    server.wait()
    server.end_with_it()
    _log_for_people(LOGGER, server)
    try:
        state = flows.study(overrides or None, at_once, targets or None, profile, engine=engine.value, return_state=True)
    except KeyboardInterrupt:
        print("interrupted; the next run goes on from here", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from None
    except Exception:  # for example, Prefect's server could not write
        disk.check(Path.cwd())
        if server.has_ended():
            raise UserError(services.ENDED) from None
        raise
    if not state.is_completed():
        print(f"error: {state.message}", file=sys.stderr)
        if (state.name or "").startswith(flows.REFUSED):
            raise typer.Exit(2)
        raise typer.Exit(disk.EXIT_CODE if disk.is_full(state.message or "") else 1)
    _tell_of_end(str(state.message))


def _tell_of_end(text: str) -> None:
    print(text)
    if "mlflow" not in services.running():
        print("`make up` starts the MLflow UI at that address, and Prefect's")


@app.command()
def mlflow() -> None:
    """Add the study's runs that are missing in MLflow, from DVC's outputs."""
    from pipelines import tracking

    synced = tracking.sync(Path.cwd())
    print(synced)
    if synced.view:
        print(services.mlflow_page(synced.store, synced.view))


@app.command()
def up(
    prefect_port: Annotated[str, typer.Option(envvar="PREFECT_PORT", help="The port of Prefect.")] = str(services.PREFECT_PORT),
    mlflow_port: Annotated[str, typer.Option(envvar="MLFLOW_PORT", help="The port of MLflow.")] = str(services.MLFLOW_PORT),
) -> None:
    """Start a Prefect server, a Prefect worker and the MLflow UI in the background, on 127.0.0.1."""
    ports = _port("PREFECT_PORT", prefect_port), _port("MLFLOW_PORT", mlflow_port)
    if ports[0] == ports[1]:
        raise UserError(f"PREFECT_PORT and MLFLOW_PORT are both {ports[0]}: expected two different ports")
    services.up(*ports, mlflow_store.tracking_uri(), print)


@app.command()
def down() -> None:
    """Stop what `up` started, and nothing else."""
    services.down(print)


def _port(name: str, text: str) -> int:
    port = whole_number(name, text, most=2**16 - 1)
    if port is None:
        raise UserError(f"{name} is empty; expected a whole number from 1 to 65535")
    return port


class _Lines(logging.Formatter):
    """Lines `stage | text` for a terminal, without passwords and without details for log files."""

    def format(self, record: logging.LogRecord) -> str:
        name = getattr(record, "task_run_name", None)
        text = super().format(record)
        text = plain(redacted(text) if record.exc_info else shown(text)).removeprefix(f"{name}: ")
        return "\n".join(f"{name:<26} | {line}" for line in text.splitlines()) if name else text


def _log_for_people(name: str, server: services.PrefectServer) -> None:
    """Show on this terminal only the flow's lines for the user, defects, and other libraries' lines; Prefect's log has all.

    Errors that Prefect logs because the disk is full or its `server` has ended are no defects: the study reports these itself.
    """

    def matters(record: logging.LogRecord) -> bool:
        defect = record.exc_info is not None and record.exc_info[0] is not None
        said = record.name.endswith(f".{name}") or not record.name.startswith("prefect")
        return said or (defect and not disk.is_nearly_full(Path.cwd()) and not server.has_ended())

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Lines())
    handler.addFilter(matters)
    for logger in (logging.getLogger(), logging.getLogger("prefect._internal")):
        logger.handlers = [handler]
    logging.raiseExceptions = False  # do not report a log that cannot be written, as on a full disk


if __name__ == "__main__":
    try:
        app(prog_name="python -m pipelines")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(disk.EXIT_CODE if isinstance(error, disk.FullDiskError) else 2)

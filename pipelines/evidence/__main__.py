"""The studies of docs/evidence: `python -m pipelines.evidence run NAME...` trains them, `write` makes the pages of results."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from dit import yamlfile
from dit.errors import UserError
from pipelines.evidence import results, running, writing
from pipelines.overrides import assignments

ROOT = Path(__file__).parents[2]
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _main() -> None:
    """Name the commands, also where there is only one."""


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(help="Names of studies: the files of profiles/evidence, without .yaml.")],
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time, all on one GPU.")] = 14,
    minutes: Annotated[
        float, typer.Option(min=0, help="Start no run after so many minutes; repeat the command to continue.")
    ] = 1e6,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace a value of params.yaml, such as images.source.root=/path/to/files."
        ),
    ] = None,
    scratch: Annotated[Path, typer.Option(help="Where the runs are kept.")] = Path(".scratch/evidence"),
    output: Annotated[Path, typer.Option(help="Where NAME.json is written.")] = results.RESULTS,
) -> None:
    """Train the runs of these studies, many at a time, and write their results."""
    started, faults, overrides = time.monotonic(), [], assignments(set_ or [])
    scratch.mkdir(parents=True, exist_ok=True)
    for name in names:
        begun = time.monotonic()
        place = running.prepare(name, ROOT, scratch, overrides)
        faults += running.run(place, workers, minutes - (begun - started) / 60)
        made = results.made_here(place, ROOT, workers, (time.monotonic() - begun) / 60)
        values = {**yamlfile.read(ROOT / running.PROFILES / f"{name}.yaml"), **overrides}
        found = results.collect(name, place, values, made).with_those_of(output / f"{name}.json")
        found.write(output / f"{name}.json")
        print(f"{name}: {len(found.runs)} of {found.planned} runs in {made.minutes:.1f} minutes: {output / name}.json")
    for fault in faults:
        print(f"error: {fault}; {scratch}/*/logs tells more", file=sys.stderr)
    if faults:
        raise typer.Exit(1)


@app.command()
def write() -> None:
    """Write docs/evidence/answers.md, its figures and answers.json from the results of all studies that ran."""
    print(f"{writing.PAGE}: {', '.join(writing.write(ROOT))}")


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

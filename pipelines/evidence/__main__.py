"""The studies of docs/evidence: `python -m pipelines.evidence run NAME...` trains them, `write` makes the pages of results."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dit import yamlfile
from dit.errors import UserError
from pipelines.device_pool import visible_gpus
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
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time on each GPU.")] = 14,
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
    """Train the runs of these studies, many at a time, and write their results.

    A run that the file to be written holds already is not trained again. Nothing is trained if the file holds results of other
    parameters, code, data, device or version of torch.
    """
    started, faults, overrides = time.monotonic(), [], assignments(set_ or [])
    scratch.mkdir(parents=True, exist_ok=True)
    places = {name: running.prepare(name, ROOT, scratch, overrides) for name in names}
    values = {name: {**yamlfile.read(ROOT / running.PROFILES / f"{name}.yaml"), **overrides} for name in places}
    files = {name: output / f"{name}.json" for name in places}
    for name, path in files.items():
        results.refuse_others(path, results.origin_here(values[name]))
    unit = "GPU minutes" if visible_gpus() else "minutes"
    for name, place in places.items():
        begun, path = time.monotonic(), files[name]
        check = partial(_refuse_other_data, path, place)
        known = results.names_in(path)
        faults += running.run(place, workers, minutes - (begun - started) / 60, check, known)
        gpu_minutes = (time.monotonic() - begun) / 60 * max(1, len(visible_gpus()))
        made = results.made_here(place, ROOT, workers, gpu_minutes)
        found = results.collect(name, place, values[name], made).with_those_of(path)
        found.write(path)
        print(f"{name}: {len(found.runs)} of {found.planned} runs in {made.minutes:.1f} {unit}: {path}")
    for fault in faults:
        print(f"error: {fault}; {scratch}/*/logs tells more", file=sys.stderr)
    if faults:
        raise typer.Exit(1)


def _refuse_other_data(path: Path, place: running.Workplace) -> None:
    results.refuse_others(path, {"data": results.data_of(place)})


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

"""Time to change one entry of `dvc.lock`, by DVC alone and with `pipelines.atomic_dvc`: `python benchmarks/lock.py`.

After each stage, DVC writes the stage's entry into `dvc.lock`. The entries of this benchmark are as large as those of a study.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from dvc.utils.serialize import dumps_yaml, modify_yaml
from measuring import Result, heading, machine, write
from rich.console import Console
from rich.table import Table

from pipelines import atomic_dvc

MD5 = "0123456789abcdef0123456789abcdef"


def main(
    entries: Annotated[list[int] | None, typer.Option(min=1, help="entries of the file; may be repeated")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="changes of each file; the quickest counts")] = 3,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Measure changes of one entry."""
    report: Result = {"machine": machine(torch.device("cpu")), "cpu_seconds": {"DVC alone": {}, "here": {}}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dvc.lock"
        for way, seconds in report["cpu_seconds"].items():
            if way == "here":
                atomic_dvc.install()
            for count in entries or [40, 400, 2000]:
                path.write_text(dumps_yaml({"schema": "2.0", "stages": dict(map(stage, range(count)))}))
                seconds[str(count)] = min(taken(path, count // 2) for _ in range(repeats))
                write(report, output)
    Console().print(table(report))


def stage(number: int) -> tuple[str, Mapping[str, Any]]:
    """Name and entry of a training run with the seed `number`."""
    name = f"adaln_zero-learning_rate=0.001-{number}"
    files = [f"runs/design/train/{name}.json", "data/latents"]
    deps = [{"path": file, "hash": "md5", "md5": MD5, "size": 1000 + number} for file in files]
    outs = [{"path": f"runs/train/{name}", "hash": "md5", "md5": f"{MD5}.dir", "size": 5_000_000, "nfiles": 10}]
    return f"train@{name}", {"cmd": f"python -m pipelines.stages.train {name}", "deps": deps, "outs": outs}


def change(path: Path, number: int) -> None:
    """Do what DVC does after a stage: compare its entry with the one in the file, and write it."""
    name, entry = stage(number)
    with modify_yaml(path) as data:
        if data["stages"].get(name) != entry:
            raise ValueError(f"{path}: the entry of {name} is not what was written")
        data["stages"].update({name: entry})


def taken(path: Path, number: int) -> float:
    """Seconds of CPU of one change."""
    before = time.process_time()
    change(path, number)
    return time.process_time() - before


def table(report: Result) -> Table:
    """A table of CPU seconds by the number of entries."""
    alone, here = report["cpu_seconds"].values()
    shown = Table("entries", "DVC alone, s of CPU", "here, s of CPU", "x", title=heading(report))
    for count in alone:
        shown.add_row(count, f"{alone[count]:.3f}", f"{here[count]:.3f}", f"{alone[count] / here[count]:.0f}")
    return shown


if __name__ == "__main__":
    typer.run(main)

"""Several runs of a small network at a time on one device, each a process of its own: `python benchmarks/sharing.py`.

On a GPU, run it once with NVIDIA's multi-process service (`nvidia-cuda-mps-control -d`) and once without it. With the service,
`CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=25` limits each run to a quarter of the GPU's multiprocessors.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Annotated

import typer
from measuring import Case, Result, heading, machine, parse_case, random_latents, write
from rich.console import Console
from rich.table import Table
from train import build, check_steps

from dit.data.latents import LatentStore
from dit.devices import make_deterministic, resolve_device
from pipelines.device_pool import multi_process_service

GPU_COUNTS, CPU_COUNTS = "1 2 4 8 15", "1 2"
FIRST_STEPS = 8
"""Steps of a run that is not measured: in it, each process compiles or loads its kernels."""
LONGEST_WAIT = 300.0
"""Seconds that a process waits for the others to begin; if one has failed, the others then fail, too."""
LIMIT_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
"""The variable that tells the multi-process service which share of the multiprocessors a process may use, in per cent."""
_shared: dict[str, Barrier] = {}


def main(
    case: Annotated[str, typer.Option(help="MODEL:BATCH@LATENT")] = "DiT-Tiny/2:64@8",
    counts: Annotated[str, typer.Option(help=f"runs at a time [default: {GPU_COUNTS} on a GPU, {CPU_COUNTS} on a CPU]")] = "",
    steps: Annotated[int | None, typer.Option(help="a power of two [default: 4096 on a GPU, 64 on a CPU]")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="blocks of the network [default: as its name says]")] = None,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Tell how many training steps per second several runs make together."""
    device, chosen = resolve_device("auto"), parse_case(case)
    on_gpu = device.type == "cuda"
    steps = steps or (4096 if on_gpu else 64)
    check_steps(steps)
    service = on_gpu and multi_process_service()
    report: Result = {"machine": machine(device), "case": case, "depth": depth, "steps": steps}
    report |= {"multi_process_service": service, "limit_percent": os.environ.get(LIMIT_VARIABLE) if service else None}
    report["results"] = []
    with tempfile.TemporaryDirectory() as folder:
        random_latents(Path(folder) / "latents", chosen.size)
        for count in (counts or (GPU_COUNTS if on_gpu else CPU_COUNTS)).split():
            rates = together(int(count), chosen, steps, Path(folder), depth)
            report["results"].append({"runs": len(rates), "steps_per_second": rates, "together": sum(rates)})
            write(report, output)
    Console().print(table(report))


def together(count: int, case: Case, steps: int, folder: Path, depth: int | None = None) -> list[float]:
    """Steps per second of each of `count` runs that train at the same time, with networks of `depth` blocks."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_wait_at, initargs=(barrier,)) as pool:
        return list(pool.map(_train, *zip(*[(case, steps, folder, number, depth) for number in range(count)], strict=True)))


def _wait_at(barrier: Barrier) -> None:
    """Let this process wait for the others at `barrier`."""
    _shared["barrier"] = barrier


def _train(case: Case, steps: int, folder: Path, number: int, depth: int | None) -> float:
    """Train once to compile, wait until all processes have done so, and train again. Returns steps per second of the latter."""
    device = resolve_device("auto")
    make_deterministic(1)
    store = LatentStore(folder / "latents")
    for length in (FIRST_STEPS, steps):
        scratch = folder / f"scratch-{number}-{length}"
        trainer = build(case.name, case.batch, store, "auto", device, scratch, seed=number, depth=depth, steps=length)
        if length == steps:
            _shared["barrier"].wait(LONGEST_WAIT)
        trainer.run(f"run {number}")
    return trainer.steady_rate / case.batch


def table(report: Result) -> Table:
    """A table of steps per second by the number of runs at a time; if one run alone was measured, also relative to it."""
    alone = next((row["together"] for row in report["results"] if row["runs"] == 1), None)
    shown = Table("runs at a time", "steps/s of each", "of all together")
    if alone:
        shown.add_column("relative to one at a time")
    blocks = f" with {report['depth']} blocks" if report["depth"] else ""
    service = f"{'with' if report['multi_process_service'] else 'without'} the multi-process service"
    limit = f", at most {report['limit_percent']} % of the multiprocessors for each run" if report["limit_percent"] else ""
    shown.title = f"{report['case']}{blocks}, {heading(report)}, {service}{limit}"
    for row in report["results"]:
        cells = [str(row["runs"]), f"{row['together'] / row['runs']:.0f}", f"{row['together']:.0f}"]
        shown.add_row(*cells, f"{row['together'] / alone:.1f}") if alone else shown.add_row(*cells)
    return shown


if __name__ == "__main__":
    typer.run(main)

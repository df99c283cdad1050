"""Sampling speed, as in stage `evaluate`: `python benchmarks/sample.py` on any device. CPU figures are only good for ratios."""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from measuring import (
    CHANNELS,
    CLASSES,
    Case,
    Result,
    heading,
    kernel_times,
    machine,
    matmul_rate,
    parse_cases,
    phase_table,
    shipped,
    wait,
    write,
)
from rich.console import Console
from rich.table import Table
from train import forward_flops

from dit import init, models
from dit.devices import make_deterministic, resolve_device, resolve_precision
from dit.sampling import Network, balanced_labels, sample

GPU_CASES = "DiT-XL/2:128@32 DiT-B/2:128@32 DiT-S/2:256@32 DiT-Tiny/2:64@8"
CPU_CASES = "DiT-Micro/2:8@8"
SOLVERS = {"ddpm": 250, "dpmsolver++": 20}
"""The published sampler and its steps, and a solver of few steps."""
GUIDANCE_SCALE = 1.5


def main(
    cases: Annotated[str, typer.Option(help="MODEL:BATCH@LATENT, separated by spaces")] = "",
    backends: Annotated[str, typer.Option(help="of auto, compiled, eager")] = "auto eager",
    measured: Annotated[int, typer.Option(min=1, help="solver steps that are timed")] = 10,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Time the steps of each solver, with guidance, and tell images per second of all of its steps."""
    device = resolve_device("auto")
    chosen = parse_cases(cases, device, GPU_CASES, CPU_CASES, multiple=1)
    make_deterministic(torch.get_num_threads())
    peak = matmul_rate(device)
    report: Result = {"machine": machine(device), "matmul_tflops": peak, "guidance_scale": GUIDANCE_SCALE, "results": []}
    for case in chosen:
        for backend in backends.split():
            for result in measure(case, backend, measured, device):
                result["share_of_matmul_rate"] = result["tflops"] / peak
                report["results"].append(result)
                write(report, output)
    console = Console(width=150)
    console.print(table(report))
    if phased := {f"{row['model']} {row['backend']} {row['scheduler']}": row for row in report["results"] if "phases" in row}:
        console.print(phase_table(phased))


def measure(case: Case, backend: str, measured: int, device: torch.device) -> list[Result]:
    """Measure one network with each solver. The time of a step comes from the difference of a run and one of twice its steps.

    The median of three such differences counts.
    """
    name, batch, size = case
    params = shipped()
    network = models.build(name, latent_size=size, latent_channels=CHANNELS, num_classes=CLASSES, learn_sigma=True)
    init.apply(network, params.strategies["head_xavier"], 0).to(device).eval()
    precision = resolve_precision("auto", device)
    chosen = models.backend_for(network, backend, device, precision, "evaluate")
    denoiser = Network(network, chosen)
    sampler = params.evaluate.model_copy(update={"guidance_scale": GUIDANCE_SCALE, "seed": 0, "batch_size": batch})
    results = []
    for scheduler, steps in SOLVERS.items():

        def seconds(count: int, scheduler: str = scheduler) -> float:
            wait(device)
            started = time.perf_counter()
            sample(
                denoiser,
                params.diffusion,
                balanced_labels(batch, CLASSES),
                sampler.model_copy(update={"scheduler": scheduler, "steps": count}),
                device=device,
                precision=precision,
                description=f"{case} {backend} {scheduler}",
            )
            return time.perf_counter() - started

        started = time.perf_counter()
        seconds(2)
        first = time.perf_counter() - started
        step = statistics.median((seconds(2 * measured) - seconds(measured)) / measured for _ in range(3))
        flops = 2 * batch * forward_flops(name, size)  # with a label and without
        result: Result = {"model": name, "batch_size": batch, "latent_size": size, "backend": backend, "runs": chosen}
        result |= {"scheduler": scheduler, "steps": steps, "milliseconds_per_step": 1e3 * step}
        if device.type == "cuda":
            result |= kernel_times(lambda: seconds(3), 3)
        result |= {"images_per_second": batch / (steps * step), "seconds_to_first_steps": first, "tflops": flops / step / 1e12}
        results.append(result)
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return results


def table(report: Result) -> Table:
    """The results as a table for a terminal."""
    shown = Table("model", "batch", "backend", "solver", "images/s", "x eager", "ms/step", "TFLOP/s", "of matmul", "start s")
    shown.title = f"{heading(report)}, guidance {report['guidance_scale']}"
    eager = {(row["model"], row["scheduler"]): row for row in report["results"] if row["backend"] == "eager"}
    for row in report["results"]:
        base = eager.get((row["model"], row["scheduler"]))
        ratio = f"{row['images_per_second'] / base['images_per_second']:.1f}" if base else ""
        cells = [row["model"], str(row["batch_size"]), row["backend"], f"{row['scheduler']}, {row['steps']} steps"]
        rates = [f"{row['images_per_second']:.3g}", ratio, f"{row['milliseconds_per_step']:.2f}", f"{row['tflops']:.3g}"]
        shown.add_row(*cells, *rates, f"{row['share_of_matmul_rate']:.0%}", f"{row['seconds_to_first_steps']:.1f}")
    return shown


if __name__ == "__main__":
    typer.run(main)

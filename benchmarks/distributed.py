"""Training on several GPUs of one host: `python benchmarks/distributed.py`. On a CPU it uses gloo; figures are only ratios.

It measures throughput and its scaling at a fixed batch for each GPU, with DDP and FSDP2, and the time that communication adds.
It compares loss curves of one global batch on one process and on several, and of a run that is killed and then continued on
another number of processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from measuring import Result, heading, machine, parse_case, parse_cases, random_latents, wait, write
from rich.console import Console
from rich.table import Table
from train import Timed, build, check_steps

from dit.devices import make_deterministic, resolve_device
from dit.distributed import joined

GPU_CASES = "DiT-XL/2:128@32 DiT-S/2:256@32"
CPU_CASES = "DiT-Micro/2:8@8"
CURVE_CASES = {"cuda": "DiT-Tiny/2:256@16", "cpu": "DiT-Micro/2:8@8"}
EXACT = "fp32"
"""The precision of runs that are killed and continued, by the plain network, so that only the order of sums differs."""
WAYS = "ddp fsdp"
MULTICAST = "0"
"""Whether NCCL uses NVLink multicast, unless the environment says: a fault in it can put all GPUs of a host out of service."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    counts: Annotated[str, typer.Option(help="numbers of processes; by default powers of two up to the GPUs, or 2")] = "",
    cases: Annotated[str, typer.Option(help="MODEL:BATCH@LATENT, the batch of each GPU, separated by spaces")] = "",
    ways: Annotated[str, typer.Option(help="of ddp and fsdp")] = WAYS,
    steps: Annotated[int, typer.Option(help="a power of two; the second half is measured; 0 for loss curves alone")] = 64,
    curve_steps: Annotated[int, typer.Option(help="steps of the loss curves; 0 for none")] = 200,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Measure one process after another number of them, on one machine."""
    if context.invoked_subcommand:
        return
    if steps:
        check_steps(steps)
    device = resolve_device("auto")
    chosen = parse_cases(cases, device, GPU_CASES, CPU_CASES)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 2
    processes = [int(count) for count in counts.split()] or [2**power for power in range(gpus.bit_length())]
    multicast = os.environ.get("NCCL_NVLS_ENABLE", MULTICAST)
    about = {**machine(device), "NCCL_NVLS_ENABLE": multicast}
    report: Result = {"machine": about, "steps": steps, "results": [], "curves": []}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for case in chosen if steps else ():
            for parallel in ways.split():
                for count in processes:
                    report["results"].append(launch(count, str(case), parallel, steps, root / "scratch"))
                    write(report, output)
        for precision in (EXACT, "bf16") if curve_steps else ():
            case = CURVE_CASES[device.type]
            for curve in curves(case, ways.split(), max(processes), curve_steps, precision, root / precision):
                report["curves"].append(curve)
                write(report, output)
    for table in (throughput(report), equality(report)):
        Console(width=140).print(table)


def launch(
    count: int, case: str, parallel: str, steps: int, scratch: Path, *, precision: str = "auto", killed_at: int = 0
) -> Result:
    """Run `worker` on `count` processes. Returns what the main rank wrote, or the exit code if a rank was `killed_at` a step.

    Speed is measured, unless `precision` is given: then the result is a loss curve.
    """
    scratch.parent.mkdir(parents=True, exist_ok=True)
    result = scratch.with_suffix(".json")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__, "worker"]
    command += [case, parallel, str(steps), str(scratch), str(result), precision, f"--killed-at={killed_at}"]
    threads = str(max(1, (os.cpu_count() or 1) // count))  # weights are drawn on the CPU
    environment = {"NCCL_NVLS_ENABLE": MULTICAST, **os.environ, "OMP_NUM_THREADS": threads}
    print(f"{case}, {parallel}, processes: {count}", end=" ... ", flush=True)
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    if not result.exists() and not killed_at:
        print(done.stdout)
        done.check_returncode()
    return json.loads(result.read_text()) if result.exists() else {"exit_code": done.returncode}


@app.command()
def worker(
    case: str,
    parallel: str,
    steps: int,
    scratch: Path,
    result: Path,
    precision: str,
    killed_at: int = 0,
) -> None:
    """One rank, started by torchrun."""
    measured = precision == "auto"
    name, batch, size = parse_case(case)
    make_deterministic(torch.get_num_threads(), deterministic=not measured)
    with joined(resolve_device("auto")) as ranks, tempfile.TemporaryDirectory() as directory:
        store = random_latents(Path(directory) / "latents", size)
        run = build(
            name,
            batch * ranks.size if measured else batch,
            store,
            "eager" if precision == EXACT else "auto",
            ranks.device,
            scratch,
            ranks,
            steps=steps,
            parallel=parallel,
            precision=precision,
            **({} if measured else {"log_every": 1, "checkpoint_every": max(1, steps // 4)}),
        )
        if killed_at and ranks.rank == ranks.size - 1:
            die_at(run, killed_at)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run.run(f"{case} {parallel} {ranks.size}")
        run.forget()
        found: Result = {"case": case, "parallel": parallel, "processes": ranks.size, "backend": run.backend}
        if measured:
            found |= speed(run)
        else:
            found["mse"] = [row["mse"] for row in run.records.metrics]
        if ranks.is_main:
            result.write_text(json.dumps(found))


def die_at(run: Timed, last: int) -> None:
    """End this process with SIGKILL when it comes to step `last`."""
    train = run._train

    def train_until_killed(step: int) -> None:
        if step == last:
            os.kill(os.getpid(), 9)
        train(step)

    run._train = train_until_killed  # type: ignore[method-assign]


def speed(run: Timed) -> Result:
    """Images a second of all ranks, peak memory of this rank, and milliseconds a step in which it only communicates."""
    found: Result = {"images_per_second": run.steady_rate}
    if run.diffusion.device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["exposed_communication_ms"] = exposed_communication(run)
    return found


def exposed_communication(run: Timed, steps: int = 3) -> float:
    """Milliseconds a step in which only kernels of NCCL run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for step in range(steps):
            run._train(run.params.steps + step + 1)  # past the steps at which something is logged
        wait(run.diffusion.device)
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    both, computing = covered(spans[True] + spans[False]), covered(spans[False])
    return (both - computing) / 1e3 / steps


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def curves(case: str, ways: list[str], most: int, steps: int, precision: str, root: Path) -> Iterator[Result]:
    """Loss curves of one global batch: on one process, on `most`, and, in float32, on another number of them after a kill."""

    def run(count: int, parallel: str, scratch: str, killed_at: int = 0) -> Result:
        return launch(count, case, parallel, steps, root / scratch, precision=precision, killed_at=killed_at)

    alone = run(1, "ddp", "alone")["mse"]
    for parallel in ways:
        about = {"case": case, "precision": precision, "parallel": parallel}
        yield {**about, "processes": str(most), **compared(run(most, parallel, f"{parallel}-together")["mse"], alone)}
        for first, second in ((most, 1), (1, most)) if precision == EXACT else ():
            started = time.perf_counter()
            ended = run(first, parallel, f"{parallel}-{first}", killed_at=3 * steps // 5)
            how = {"exit_code": ended["exit_code"], "seconds_until_it_ended": time.perf_counter() - started}
            resumed = run(second, parallel, f"{parallel}-{first}")["mse"]
            yield {**about, "processes": f"{first}, killed, {second}", **compared(resumed, alone), **how}


def compared(mse: list[float], alone: list[float]) -> Result:
    """The largest relative difference of two loss curves."""
    difference = max(abs(one / other - 1) for one, other in zip(mse, alone, strict=True))
    return {"steps": len(mse), "largest_relative_difference": difference, "last_mse": mse[-1]}


def throughput(report: Result) -> Table:
    """A table of images a second and efficiency: the rate divided by the rate of one process times their number."""
    shown = Table("case (batch per GPU)", "parallel", "processes", "images/s", "efficiency", "GiB each", "exposed ms/step")
    shown.title = heading(report)
    base = {(row["case"], row["parallel"]): row["images_per_second"] for row in report["results"] if row["processes"] == 1}
    for row in report["results"]:
        rate, one = row["images_per_second"], base.get((row["case"], row["parallel"]))
        share = f"{rate / (row['processes'] * one):.1%}" if one else ""
        memory, exposed = (f"{row[key]:.1f}" if key in row else "" for key in ("peak_gib", "exposed_communication_ms"))
        shown.add_row(row["case"], row["parallel"], str(row["processes"]), f"{rate:.0f}", share, memory, exposed)
    return shown


def equality(report: Result) -> Table:
    """A table of the differences between loss curves of the same global batch."""
    shown = Table(
        "precision", "parallel", "processes", "steps", "largest relative difference", "last mse", "ended with", "after s"
    )
    for row in report["curves"]:
        run = [row["precision"], row["parallel"], row["processes"], str(row["steps"])]
        losses = [f"{row['largest_relative_difference']:.1e}", f"{row['last_mse']:.4f}"]
        ending = [str(row["exit_code"]), f"{row['seconds_until_it_ended']:.1f}"] if "exit_code" in row else ["", ""]
        shown.add_row(*run, *losses, *ending)
    return shown


if __name__ == "__main__":
    app()

"""Throughput of the real training loop: `python benchmarks/train.py` on any device. CPU figures are only good for ratios."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
    random_latents,
    shipped,
    wait,
    write,
)
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from dit import init, models
from dit.data.latents import LatentStore
from dit.devices import make_deterministic, resolve_device
from dit.diffusion import Diffusion
from dit.distributed import Ranks
from dit.training.loop import Trainer

GPU_CASES = "DiT-XL/2:128@32 DiT-B/2:256@32 DiT-S/2:256@32 DiT-Tiny/2:64@8"
CPU_CASES = "DiT-Tiny/2:64@8"
GPU_BACKENDS, CPU_BACKENDS = "auto deterministic eager", "eager"
FORWARD_AND_BACKWARD = 3
"""FLOPs of forward and backward pass, relative to the forward pass: the backward pass needs two products for each product."""
OUT_OF_MEMORY = "out of memory"
FEWEST_STEPS = 8
SHORTEST_MEASUREMENT = 1.0
"""The shortest measurement in seconds: other work of the host disturbs a shorter one, as of 31 steps of a small network."""


class Timed(Trainer):
    """A trainer that notes the times after the first step, after the first step of the second half, and after the last step."""

    def run(self, description: str) -> None:
        """Run the trainer, and note when it starts."""
        self.started = time.perf_counter()
        super().run(description)

    def _train(self, step: int) -> None:
        super()._train(step)
        if step in {0, self.params.steps // 2, self.params.steps - 1}:
            wait(self.diffusion.device)
            self.times = [*getattr(self, "times", []), time.perf_counter()]

    @property
    def measured_seconds(self) -> float:
        """Seconds of the second half of the steps, without its first step, because validation comes before that step."""
        return self.times[2] - self.times[1]

    @property
    def steady_rate(self) -> float:
        """Images per second in `measured_seconds`."""
        steps = self.params.steps - self.params.steps // 2 - 1
        return steps * self.params.batch_size / self.measured_seconds


def main(
    cases: Annotated[str, typer.Option(help="MODEL:BATCH@LATENT, separated by spaces")] = "",
    backends: Annotated[str, typer.Option(help="of auto, deterministic, compiled, eager")] = "",
    steps: Annotated[int, typer.Option(help="a power of two; the second half is measured, of more if it lasts under 1 s")] = 64,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
    profile: Annotated[bool, typer.Option(help="also tell kernel time by phase, on a GPU")] = True,
) -> None:
    """Train each case with each backend and tell images per second, memory, arithmetic rate and where the time goes."""
    check_steps(steps)
    device = resolve_device("auto")
    chosen = parse_cases(cases, device, GPU_CASES, CPU_CASES)
    peak = matmul_rate(device)
    report: Result = {"machine": machine(device), "matmul_tflops": peak, "results": []}
    for case in chosen:
        for backend in (backends or (GPU_BACKENDS if device.type == "cuda" else CPU_BACKENDS)).split():
            result = measure(case, backend, steps, device, profile and device.type == "cuda")
            if "tflops" in result:
                result["share_of_matmul_rate"] = result["tflops"] / peak
            report["results"].append(result)
            print(json.dumps({key: value for key, value in result.items() if key != "kernels"}), flush=True)
            write(report, output)
    show(report)


def check_steps(steps: int) -> None:
    """Raises `typer.BadParameter` unless the second half is free of validation and of the early diagnoses."""
    if steps & (steps - 1) or steps < FEWEST_STEPS:
        raise typer.BadParameter(f"{steps}: expected a power of two of at least {FEWEST_STEPS}", param_hint="--steps")


def measure(case: Case, backend: str, steps: int, device: torch.device, profile: bool) -> Result:
    """Measure the training loop without checkpoints and without diagnoses of later steps."""
    name, batch, size = case
    deterministic = backend == "deterministic"
    result: Result = {"model": name, "batch_size": batch, "latent_size": size, "backend": backend}
    make_deterministic(torch.get_num_threads(), deterministic)
    torch.use_deterministic_algorithms(deterministic)
    with tempfile.TemporaryDirectory() as directory:
        try:
            store = random_latents(Path(directory) / "latents", size)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            make = partial(build, name, batch, store, backend, device, Path(directory) / "scratch")
            trainer, result["seconds_to_first_step"] = run_timed(make, steps, f"{case} {backend}")
            rate = trainer.steady_rate
            flops = FORWARD_AND_BACKWARD * forward_flops(name, size)
            result |= {"steps": trainer.params.steps, "images_per_second": rate}
            result |= {"milliseconds_per_step": 1e3 * batch / rate, "tflops": rate * flops / 1e12}
            if device.type == "cuda":
                result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if profile:
                result |= kernel_times(lambda: train_three(trainer), 3)
        except torch.cuda.OutOfMemoryError:
            result["error"] = OUT_OF_MEMORY
    trainer = None  # type: ignore[assignment]
    _free()
    return result


def run_timed(make: Callable[..., Timed], steps: int, description: str) -> tuple[Timed, float]:
    """A trainer after `steps` steps, or more if the measurement needs more; and the seconds to the very first step."""
    first = None
    while True:
        trainer = make(steps=steps)
        trainer.run(description)
        first = first or trainer.times[0] - trainer.started
        if (seconds := trainer.measured_seconds) >= SHORTEST_MEASUREMENT:
            return trainer, first
        steps <<= math.ceil(math.log2(SHORTEST_MEASUREMENT / seconds))
        del trainer
        _free()


def build(
    name: str,
    batch: int,
    store: LatentStore,
    backend: str,
    device: torch.device,
    scratch: Path,
    ranks: Ranks | None = None,
    seed: int = 0,
    depth: int | None = None,
    **changes: object,
) -> Timed:
    """A trainer with the shipped parameters, except `changes`, and without the parts that a benchmark leaves out.

    `depth` is the number of blocks; by default it is that of the network called `name`.
    """
    params = shipped()
    never = dict.fromkeys(("diagnose_every", "validate_every", "checkpoint_every"), 1 << 30)
    validation = params.train.validation.model_copy(update={"samples": 64, "batch_size": min(64, batch)})
    chosen = "auto" if backend == "deterministic" else backend
    usual = {"batch_size": batch, "log_every": 50, "learning_rate": 1e-4, "ema_decay": 0.9999, "backend": chosen}
    train = params.train.model_copy(update={**never, "validation": validation, **usual, **changes})
    shape = {"latent_size": store.latent_size, "latent_channels": CHANNELS, "num_classes": CLASSES}
    options = {} if depth is None else {"depth": depth}
    network = init.apply(models.build(name, **shape, learn_sigma=True, **options), params.strategies["adaln_zero"], seed)
    diffusion = Diffusion(params.diffusion, device)
    return Timed(network, store, diffusion, train, label_dropout=0.1, seed=seed, scratch=scratch, ranks=ranks)


def forward_flops(name: str, size: int) -> int:
    """Floating-point operations of one image's forward pass: matrix products and attention, counted by torch."""
    with torch.device("meta"):
        network = models.build(name, latent_size=size, latent_channels=CHANNELS, num_classes=CLASSES, learn_sigma=True)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, CHANNELS, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def train_three(trainer: Trainer) -> None:
    """Take three training steps, and do nothing else."""
    for step in range(3):
        trainer.engine.gradients(trainer.batches(step))
        trainer._update(step, trainer.engine.gradient_norm())


def show(report: Result) -> None:
    """Print the tables."""
    console = Console(width=150)
    table = Table("model", "batch", "backend", "images/s", "x eager", "ms/step", "TFLOP/s", "of matmul", "GiB", "first step s")
    table.title = heading(report)
    eager = {row["model"]: row.get("images_per_second") for row in report["results"] if row["backend"] == "eager"}
    for row in report["results"]:
        cells = [row["model"], str(row["batch_size"]), row["backend"]]
        if "error" in row:
            table.add_row(*cells, row["error"])
            continue
        rate, base = row["images_per_second"], eager.get(row["model"])
        memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
        ratio = f"{rate / base:.1f}" if base else ""
        share = f"{row['share_of_matmul_rate']:.0%}"
        numbers = [f"{rate:.0f}", ratio, f"{row['milliseconds_per_step']:.2f}", f"{row['tflops']:.3g}", share, memory]
        table.add_row(*cells, *numbers, f"{row['seconds_to_first_step']:.1f}")
    console.print(table)
    if phased := {f"{row['model']} {row['backend']}": row for row in report["results"] if "phases" in row}:
        console.print(phase_table(phased))


def _free() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)

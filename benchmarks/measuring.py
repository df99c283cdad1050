"""Shared parts of the benchmarks: a description of the machine, its matrix product rate, random latents, and result files."""

from __future__ import annotations

import json
import math
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import typer
from rich.table import Table

from dit.config import Params, load
from dit.data.latents import LatentStore
from dit.data.store import StoreWriter
from dit.errors import ConfigError
from dit.models.dit import PATCH_SIZES
from dit.models.sizes import parse_name

Result = dict[str, Any]

CHANNELS, CLASSES = 4, 1000
COARSE = 4
"""The side, in latent pixels, of the squares in which random latents are constant."""

PHASES = {
    "attention": ("attention", "sdpa", "flash", "fmha"),
    "convolutions": ("fprop", "dgrad", "wgrad", "conv2d", "convolve", "nchwToNhwc", "nhwcToNchw"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitKreduce", "xmma", "_matmul_dgelu"),
    "norm, modulation, residual": (
        "_residual_norm",
        "_fold",
        "layer_norm",
        "_group_",
        "_gradient",  # and _gradient_sums, of the group norm
        "_padded_sum",
        "_doubled_sum",
        "group_norm",
        "RowwiseMoments",
    ),
    "optimiser and EMA": ("_adamw_ema", "multi_tensor", "FusedAdam"),
    "bias gradients": ("_sum_rows", "reduce_kernel"),
}
"""Substrings of kernel names by phase; the first match counts, and other kernels are `all else`."""


class Case(NamedTuple):
    """A network, its batch and the height and width of its latents, as in `DiT-XL/2:128@32`."""

    name: str
    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.name}:{self.batch}@{self.size}"


def parse_case(text: str, multiple: int = COARSE) -> Case:
    """Parse a case of `--cases`; its latent size must be a multiple of `multiple`. Raises `typer.BadParameter`."""
    found = re.fullmatch(r"(.+):([1-9]\d*)@([1-9]\d*)", text)
    try:
        if not found:
            raise ConfigError(f"'{text}': expected MODEL:BATCH@LATENT, such as DiT-XL/2:128@32")
        _, patch = parse_name(found[1], "DiT", PATCH_SIZES)
        if int(found[3]) % (whole := max(patch, multiple)):
            raise ConfigError(f"'{text}': latents of {found[3]}; their size should be a multiple of {whole}")
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--cases") from error
    return Case(found[1], int(found[2]), int(found[3]))


def parse_cases(text: str, device: torch.device, gpu: str, cpu: str, multiple: int = COARSE) -> list[Case]:
    """Parse several cases, separated by spaces; by default the cases in `gpu` on CUDA, otherwise those in `cpu`."""
    return [parse_case(part, multiple) for part in (text or (gpu if device.type == "cuda" else cpu)).split()]


def shipped() -> Params:
    """The parameters of this repository, from any working directory."""
    return load(Path(__file__).parents[1] / "params.yaml")


def machine(device: torch.device) -> Result:
    """The machine and the versions with which figures were measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "diffusers": version("diffusers")}
    return {"device": name, **versions, "python": platform.python_version(), "threads": torch.get_num_threads()}


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matmul_rate(device: torch.device) -> float:
    """TFLOP/s of a square matrix product of random numbers, in bf16 on CUDA and in float32 elsewhere."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for repeats in (3, 20):
        wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        wait(device)
    return 2 * size**3 * repeats / (time.perf_counter() - started) / 1e12


def kernel_times(work: Callable[[], object], steps: int) -> Result:
    """Milliseconds of kernel time a step, by phase and for the fifteen longest kernels; `work` takes `steps` steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / 1e3 / steps for event in profiler.key_averages()}
    phases = dict.fromkeys([*PHASES, "all else"], 0.0)
    for kernel, milliseconds in times.items():
        matches = (phase for phase, parts in PHASES.items() if any(part in kernel for part in parts))
        phases[next(matches, "all else")] += milliseconds
    most = sorted(times.items(), key=lambda item: -item[1])[:15]
    return {"phases": phases, "kernels": {kernel[:120]: milliseconds for kernel, milliseconds in most}}


def phase_table(results: dict[str, Result]) -> Table:
    """Kernel times by phase, a column for each result; the rest of a step's time, the device is idle."""
    times = Table("kernel ms a step", *results)
    for phase in [*PHASES, "all else"]:
        times.add_row(phase, *(f"{row['phases'][phase]:.2f}" for row in results.values()))
    times.add_row("together", *(f"{sum(row['phases'].values()):.2f}" for row in results.values()))
    return times


def pixel_error(found: np.ndarray, exact: np.ndarray) -> Result:
    """The error of pixels against exact ones, both uint8: mean and largest difference in grey values, and the PSNR in dB.

    If they are equal, the PSNR is None.
    """
    difference = np.abs(found.astype(np.int64) - exact)
    mean_square = float(np.square(difference).mean())
    psnr = 10 * math.log10(255**2 / mean_square) if mean_square else None
    return {"mean": float(difference.mean()), "largest": int(difference.max()), "psnr": psnr}


def random_latents(directory: Path, size: int, train: int = 2048, validation: int = 64) -> LatentStore:
    """A store of smooth random latents (4, size, size) of 1000 classes, with mirror images."""
    item = (np.float32, (2, CHANNELS, size, size))
    kinds = {"mean": item, "std": item, "labels": (np.int64, ())}
    splits = {"train": train, "validation": validation}
    writer = StoreWriter(directory, **{f"{split}_{kind}": spec for split in splits for kind, spec in kinds.items()})
    draws = np.random.default_rng(0)
    for split, count in splits.items():
        coarse = draws.standard_normal((count, 2, CHANNELS, size // COARSE, size // COARSE), dtype=np.float32)
        mean = coarse.repeat(COARSE, axis=3).repeat(COARSE, axis=4)
        writer.append(f"{split}_mean", mean)
        writer.append(f"{split}_std", np.full_like(mean, 0.05))
        writer.append(f"{split}_labels", np.arange(count) % CLASSES)
    unit = {"shift": [0.0] * CHANNELS, "scale": [1.0] * CHANNELS}
    names = [str(label) for label in range(CLASSES)]
    writer.close(class_names=names, num_classes=CLASSES, flip=True, normalize=unit)
    return LatentStore(directory)


def write(report: Result, output: Path | None) -> None:
    """Write the results so far as JSON, so that a benchmark that is stopped early keeps them."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")


def heading(report: Result) -> str:
    """The title of a table: machine and versions."""
    about = report["machine"]
    rate = f", matmul {report['matmul_tflops']:.3g} TFLOP/s" if "matmul_tflops" in report else ""
    return f"{about['device']}, torch {about['torch']}{rate}"

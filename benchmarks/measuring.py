"""What the benchmarks share: the machine they ran on, its matrix product rate, latents to work on, and where results go."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit.config import Params, load
from dit.data.latents import LatentStore
from dit.data.store import StoreWriter

Result = dict[str, Any]

CHANNELS, CLASSES = 4, 1000
COARSE = 4
"""Latent pixels across which random latents do not change."""


def shipped() -> Params:
    """The parameters of this repository, from any working directory."""
    return load(Path(__file__).parents[1] / "params.yaml")


def machine(device: torch.device) -> Result:
    """What the figures were measured on and with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "diffusers": version("diffusers")}
    return {"device": name, **versions, "python": platform.python_version(), "threads": torch.get_num_threads()}


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matmul_rate(device: torch.device) -> float:
    """TFLOP/s of a square bf16 matrix product (float32 on a CPU), on random numbers."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for repeats in (3, 20):
        wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        wait(device)
    return 2 * size**3 * repeats / (time.perf_counter() - started) / 1e12


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
    """Write what is known so far as JSON, so that a benchmark that is stopped has not been in vain."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")


def heading(report: Result) -> str:
    """The title of a table: machine and versions."""
    about = report["machine"]
    rate = f", matmul {report['matmul_tflops']:.3g} TFLOP/s" if "matmul_tflops" in report else ""
    return f"{about['device']}, torch {about['torch']}{rate}"

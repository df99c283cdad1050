"""Training speed of the autoencoder, as in stage `autoencoder`: `python benchmarks/autoencoder.py`.

On a GPU it has the sizes of profiles/gpu.yaml, otherwise those of the default study. On an NVIDIA GPU, each backend of
`dit.autoencoder.training` is measured. CPU figures are only good for ratios.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from measuring import Result, heading, kernel_times, machine, phase_table, pixel_error, shipped, wait, write
from rich.console import Console
from rich.table import Table

from dit.autoencoder import Decoder, Encoder, training
from dit.autoencoder.quality import reconstruction_quality
from dit.config import Params
from dit.data.images import ImageStore, load_images
from dit.data.ingest import write_images
from dit.devices import is_nvidia, make_deterministic, resolve_device
from pipelines.experiments import profile


def main(
    steps: Annotated[int | None, typer.Option(min=2, help="steps that are timed [default: 400 on a GPU, 20 on a CPU]")] = None,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Tell optimiser steps per second, and on an NVIDIA GPU how good autoencoders trained in bf16 and decoding in bf16 are."""
    device = resolve_device("auto")
    make_deterministic(torch.get_num_threads())
    params = sized(device)
    timed = steps or (20 if device.type == "cpu" else 400)
    report: Result = {
        "machine": machine(device),
        "pixels": params.images.size,
        "channels": params.autoencoder.channels,
        "batch_size": params.autoencoder.batch_size,
        "steps": timed,
        "results": [],
    }
    with tempfile.TemporaryDirectory() as directory:
        write_images(params.images, Path(directory) / "images")
        store = load_images(Path(directory) / "images")
        measure_all(report, params, store, device, output)
    console = Console(width=120)
    console.print(table(report))
    if phased := {row["backend"]: row for row in report["results"] if "phases" in row}:
        console.print(phase_table(phased))
    for backend, quality in report.get("quality", {}).items():
        print(f"{backend}: reconstructions after {params.autoencoder.steps} steps: PSNR {quality['psnr']:.2f} dB")
    if "decoding" in report:
        error = report["decoding"]["error"]
        words = f"mean {error['mean']:.3f} grey values, largest {error['largest']}, PSNR {error['psnr']:.1f} dB"
        console.print(f"bf16 fused decoding against float32, after {params.autoencoder.steps} steps: {words}")


def measure_all(report: Result, params: Params, store: ImageStore, device: torch.device, output: Path | None) -> None:
    """Measure the speed of each backend; on an NVIDIA GPU also what training and decoding in bf16 change."""
    nvidia = is_nvidia(device)
    backends: list[training.Backend] = ["eager", "graph", "fused"] if nvidia else ["eager"]
    for backend in backends:
        rates = measure(params, store.train_images, device, report["steps"], backend)
        report["results"].append({"backend": backend, **rates})
        write(report, output)
    if nvidia:
        measure_bf16(report, params, store, device)
        write(report, output)


def measure_bf16(report: Result, params: Params, store: ImageStore, device: torch.device) -> None:
    """The quality of an autoencoder trained in float32 and in bf16; the error of the pixels that the latter decodes in bf16."""
    report["quality"] = {}
    compared: list[training.Backend] = ["graph", "fused"]
    for backend in compared:
        steps = training.Steps(params.autoencoder, store.train_images, device, backend)
        for step in range(params.autoencoder.steps):
            steps(step)
        trained = steps.autoencoder.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
        report["quality"][backend] = reconstruction_quality(trained, store.validation_images)
    latents, _ = Encoder(trained)(store.validation_images)
    found, exact = (decode(latents) for decode in (Decoder(trained, torch.bfloat16, "fused"), Decoder(trained)))
    report["decoding"] = {"images": len(latents), "error": pixel_error(found, exact)}


def sized(device: torch.device) -> Params:
    """The parameters whose sizes are measured, for `device`."""
    values = profile(Path(__file__).parents[1], "gpu") if device.type == "cuda" else {}
    kept = {key: value for key, value in values.items() if key.startswith(("images.", "autoencoder."))}
    return shipped().with_values(kept | {"autoencoder.device": device.type})


def measure(params: Params, images: np.ndarray, device: torch.device, steps: int, backend: training.Backend) -> Result:
    """Steps per second after the first three steps, the seconds until then, and on a GPU the kernel times of a step."""
    started = time.perf_counter()
    take = training.Steps(params.autoencoder, images, device, backend)
    for step in range(3):
        take(step)
    wait(device)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(3, 3 + steps):
        take(step)
    wait(device)
    rate = steps / (time.perf_counter() - started)
    found: Result = {"steps_per_second": rate, "seconds_to_first_steps": first}
    return found | (kernel_times(partial(take, 0), 1) if device.type == "cuda" else {})


def table(report: Result) -> Table:
    """The results as a table for a terminal."""
    shown = Table("backend", "steps/s", "x eager", "s to the third step")
    sizes = f"{report['pixels']} pixels, channels {report['channels']}, batches of {report['batch_size']}"
    shown.title = f"{heading(report)}; {sizes}"
    plain = report["results"][0]["steps_per_second"]
    for row in report["results"]:
        rate = row["steps_per_second"]
        shown.add_row(row["backend"], f"{rate:.4g}", f"{rate / plain:.2f}", f"{row['seconds_to_first_steps']:.1f}")
    return shown


if __name__ == "__main__":
    typer.run(main)

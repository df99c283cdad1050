"""Encoding and decoding speed at 256 pixels, as stages `latents` and `evaluate` do it: `python benchmarks/encode.py`.

The autoencoder has the shape of the published f8 one (stabilityai/sd-vae-ft-ema) and random weights, or, on a CPU, a quarter of
its width. CPU figures are only ratios.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from measuring import Result, heading, kernel_times, machine, matmul_rate, phase_table, shipped, wait, write
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from dit.autoencoder import Encoder, decode
from dit.data.images import ImageStore
from dit.data.latents import write_latents
from dit.devices import DTYPES, make_deterministic, resolve_backend, resolve_device, resolve_precision
from dit.fused.encoder import NEEDS, supports

WIDTHS = (128, 256, 512, 512)
PLAIN = torch.float32
"""Images are decoded so, as their distances are measured."""


def main(
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    pixels: Annotated[int, typer.Option(min=64, help="height and width of the images")] = 256,
    batches: Annotated[int, typer.Option(min=2, help="batches that are timed")] = 16,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Tell images per second of the encoder, of the whole stage with what it writes to disk, and of the decoder."""
    device = resolve_device("auto")
    make_deterministic(torch.get_num_threads())
    peak = matmul_rate(device)
    narrow = 4 if device.type == "cpu" else 1
    report: Result = {
        "machine": machine(device),
        "matmul_tflops": peak,
        "batch_size": batch_size,
        "pixels": pixels,
        "results": [],
    }
    autoencoder = published_shape([width // narrow for width in WIDTHS], pixels).to(device)
    images = np.random.default_rng(0).integers(0, 256, (batch_size * batches, pixels, pixels, 3), np.uint8)
    chosen = resolve_precision("auto", device)
    fastest = resolve_backend("auto", device, chosen, supports(autoencoder), "latents", NEEDS)
    for precision, backend in dict.fromkeys([(PLAIN, "eager"), (chosen, "eager"), (chosen, fastest)]):
        encoder = Encoder(autoencoder, precision, backend)
        for work, seconds, flops in measure(
            autoencoder, encoder, images, batch_size, decoded=(precision, backend) == (PLAIN, "eager")
        ):
            rate = len(images) / seconds
            arithmetic = next(name for name, dtype in DTYPES.items() if dtype == precision)
            result: Result = {"work": work, "precision": arithmetic, "backend": backend, "images_per_second": rate}
            if device.type == "cuda" and work == "encode":
                result |= kernel_times(lambda: encoder(images[:batch_size]), 1)  # noqa: B023
            report["results"].append({**result, "share_of_matmul_rate": rate * flops / 1e12 / peak})
            write(report, output)
    console = Console(width=120)
    console.print(table(report))
    if phased := {f"{row['precision']} {row['backend']}": row for row in report["results"] if "phases" in row}:
        console.print(phase_table(phased))


def published_shape(widths: list[int], pixels: int) -> AutoencoderKL:
    """The autoencoder of Rombach et al. (2022) with four resolutions, of these widths."""
    return (
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=tuple(widths),
            layers_per_block=2,
            latent_channels=4,
            sample_size=pixels,
        )
        .eval()
        .requires_grad_(False)
    )


def measure(
    autoencoder: AutoencoderKL, encoder: Encoder, images: np.ndarray, batch_size: int, *, decoded: bool
) -> list[tuple[str, float, float]]:
    """What was done, the seconds that it took for all of `images`, and the operations for one of them."""
    parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    settings = shipped().latents.model_copy(update={"batch_size": batch_size, "flip": False, "dtype": "float16"})
    labels = np.zeros(len(images), np.int64)
    store = ImageStore(images, labels, images[:1], labels[:1], ["one"], {})
    latents = encoder(images[:batch_size])[0]
    with FlopCounterMode(display=False) as counter:
        Encoder(autoencoder)(images[:1])
    forward = counter.get_total_flops()
    wait(encoder.device)
    started = time.perf_counter()
    for part in parts:
        encoder(part)
    wait(encoder.device)
    alone = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        write_latents(store, encoder, settings, Path(directory) / "latents")
        whole = time.perf_counter() - started
    found = [("encode", alone, forward), ("encode and store", whole, forward)]
    if decoded:
        decode(autoencoder, latents)
        with FlopCounterMode(display=False) as counter:
            decode(autoencoder, latents[:1])
        started = time.perf_counter()
        for _ in parts:
            decode(autoencoder, latents)
        found.append(("decode", time.perf_counter() - started, counter.get_total_flops()))
    return found


def table(report: Result) -> Table:
    """What was measured, for a terminal."""
    shown = Table("work", "precision", "backend", "images/s", "x fp32", "of matmul rate")
    shown.title = f"{heading(report)}; {report['pixels']} pixels, batches of {report['batch_size']}"
    plain = {
        row["work"]: row["images_per_second"]
        for row in report["results"]
        if (row["precision"], row["backend"]) == ("fp32", "eager")
    }
    for row in report["results"]:
        rate = row["images_per_second"]
        cells = [row["work"], row["precision"], row["backend"], f"{rate:.4g}", f"{rate / plain[row['work']]:.2f}"]
        shown.add_row(*cells, f"{row['share_of_matmul_rate']:.0%}")
    return shown


if __name__ == "__main__":
    typer.run(main)

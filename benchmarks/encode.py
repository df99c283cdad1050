"""Speed of encoding and decoding at 256 pixels, as in stages `latents` and `evaluate`: `python benchmarks/encode.py`.

The autoencoder has random weights and the shape of the published f8 autoencoder (stabilityai/sd-vae-ft-ema), on a CPU with a
quarter of its width. CPU figures are only good for ratios.
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
from measuring import Result, heading, kernel_times, machine, matmul_rate, phase_table, pixel_error, shipped, wait, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit.autoencoder import Decoder, Encoder
from dit.data.images import ImageStore
from dit.data.latents import write_latents
from dit.devices import make_deterministic, name_of, resolve_backend, resolve_device, resolve_precision
from dit.fused import decoder as fused_decoder, encoder as fused_encoder
from dit.fused.residual import NEEDS

WIDTHS = (128, 256, 512, 512)
PLAIN = torch.float32


def main(
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    pixels: Annotated[int, typer.Option(min=64, help="height and width of the images")] = 256,
    batches: Annotated[int, typer.Option(min=2, help="batches that are timed")] = 16,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Tell images per second of the encoder, of stage `latents` with what it writes, and of the decoder with its error."""
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
    supported = fused_encoder.supports(autoencoder) and fused_decoder.supports(autoencoder)
    fastest = resolve_backend("auto", device, chosen, supported, "latents", NEEDS)
    exact, latents = Decoder(autoencoder), Encoder(autoencoder)(images[:batch_size])[0]
    for precision, backend in dict.fromkeys([(PLAIN, "eager"), (chosen, "eager"), (chosen, fastest)]):
        encoder, decoder = Encoder(autoencoder, precision, backend), Decoder(autoencoder, precision, backend)
        measured = [*encoding(autoencoder, encoder, images, batch_size), *decoding(decoder, exact, latents, batches)]
        for row in measured:
            flops = row.pop("flops_per_image")
            share = row["images_per_second"] * flops / 1e12 / peak
            report["results"].append(
                {**row, "precision": name_of(precision), "backend": backend, "share_of_matmul_rate": share}
            )
        write(report, output)
    console = Console(width=120)
    console.print(table(report))
    if phased := {f"{row['work']} {row['precision']} {row['backend']}": row for row in report["results"] if "phases" in row}:
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


def encoding(autoencoder: AutoencoderKL, encoder: Encoder, images: np.ndarray, batch_size: int) -> list[Result]:
    """Images per second of the encoder alone, and of the whole work of stage `latents`."""
    parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    settings = shipped().latents.model_copy(update={"batch_size": batch_size, "flip": False, "dtype": "float16"})
    labels = np.zeros(len(images), np.int64)
    store = ImageStore(images, labels, images[:1], labels[:1], ["one"], {})
    with FlopCounterMode(display=False) as counter:
        Encoder(autoencoder)(images[:1])
    flops = counter.get_total_flops()
    encoder(parts[0])
    wait(encoder.device)
    started = time.perf_counter()
    for part in parts:
        encoder(part)
    wait(encoder.device)
    alone: Result = {"work": "encode", "images_per_second": len(images) / (time.perf_counter() - started)}
    if encoder.device.type == "cuda":
        alone |= kernel_times(lambda: encoder(parts[0]), 1)
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        write_latents(store, encoder, settings, Path(directory) / "latents")
        rate = len(images) / (time.perf_counter() - started)
    return [{**row, "flops_per_image": flops} for row in (alone, {"work": "encode and store", "images_per_second": rate})]


def decoding(decoder: Decoder, exact: Decoder, latents: Tensor, batches: int) -> list[Result]:
    """Images per second of the decoder, and the difference of its pixels to those of `exact`, which decodes in float32."""
    with FlopCounterMode(display=False) as counter:
        exact(latents[:1])
    error = pixel_error(decoder(latents), exact(latents))
    started = time.perf_counter()
    for _ in range(batches):
        decoder(latents)
    rate = batches * len(latents) / (time.perf_counter() - started)
    row: Result = {"work": "decode", "images_per_second": rate, "flops_per_image": counter.get_total_flops(), "error": error}
    if decoder.device.type == "cuda":
        row |= kernel_times(lambda: decoder(latents), 1)
    return [row]


def table(report: Result) -> Table:
    """The results as a table for a terminal."""
    shown = Table("work", "precision", "backend", "images/s", "x fp32", "of matmul rate", "error: mean, largest, PSNR")
    shown.title = f"{heading(report)}; {report['pixels']} pixels, batches of {report['batch_size']}"
    plain = {
        row["work"]: row["images_per_second"]
        for row in report["results"]
        if (row["precision"], row["backend"]) == ("fp32", "eager")
    }
    for row in report["results"]:
        rate = row["images_per_second"]
        cells = [row["work"], row["precision"], row["backend"], f"{rate:.4g}", f"{rate / plain[row['work']]:.2f}"]
        error = row.get("error")
        words = f"{error['mean']:.3f}, {error['largest']}; {error['psnr']:.1f} dB" if error and error["psnr"] else ""
        shown.add_row(*cells, f"{row['share_of_matmul_rate']:.0%}", words)
    return shown


if __name__ == "__main__":
    typer.run(main)

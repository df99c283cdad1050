"""Speed of the feature network, as in stages `features` and `evaluate`: `python benchmarks/features.py`.

On an NVIDIA GPU it is measured kernel by kernel and as a CUDA graph. CPU figures are only good for ratios.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from measuring import Result, heading, kernel_times, machine, shipped, wait, write
from rich.console import Console
from rich.table import Table

from dit.devices import is_nvidia, make_deterministic, resolve_device
from dit.evaluation.features import FeatureExtractor, load_extractor


def main(
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    pixels: Annotated[int, typer.Option(min=8, help="height and width of the images")] = 64,
    batches: Annotated[int | None, typer.Option(min=2, help="batches that are timed [default: 100 on a GPU, else 4]")] = None,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Tell images per second of the shipped feature network, from pixels of the host to features of the host."""
    device = resolve_device("auto")
    make_deterministic(torch.get_num_threads())
    timed = batches or (100 if device.type == "cuda" else 4)
    params = shipped().features
    report: Result = {
        "machine": machine(device),
        "extractor": params.extractor,
        "size": params.size,
        "batch_size": batch_size,
        "pixels": pixels,
        "results": [],
    }
    images = np.random.default_rng(0).integers(0, 256, (batch_size, pixels, pixels, 3), np.uint8)
    extractor = load_extractor(params, device)
    for launched in ("eager", "graph") if is_nvidia(device) else ("eager",):
        report["results"].append({"launched": launched, **measure(extractor, images, timed, launched == "graph")})
        write(report, output)
    Console(width=120).print(table(report))


def measure(extractor: FeatureExtractor, images: np.ndarray, batches: int, graph: bool) -> Result:
    """Images per second, and on a GPU the kernel times of a batch."""
    call = extractor if graph else partial(eager, extractor)
    for _ in range(2):
        call(images)
    wait(extractor.device)
    started = time.perf_counter()
    for _ in range(batches):
        call(images)
    rate = batches * len(images) / (time.perf_counter() - started)
    found: Result = {"images_per_second": rate}
    return found | (kernel_times(partial(call, images), 1) if extractor.device.type == "cuda" else {})


@torch.inference_mode()
def eager(extractor: FeatureExtractor, images: np.ndarray) -> torch.Tensor:
    """The extractor's computation, launched kernel by kernel."""
    pixels: torch.Tensor = extractor.network(extractor._pixels(images))
    return pixels.float().cpu()


def table(report: Result) -> Table:
    """The results as a table for a terminal."""
    shown = Table("launched", "images/s", "x eager")
    sizes = f"{report['pixels']} pixels to {report['size']}, batches of {report['batch_size']}"
    shown.title = f"{heading(report)}; {report['extractor']}, {sizes}"
    for row in report["results"]:
        rate = row["images_per_second"]
        shown.add_row(row["launched"], f"{rate:.4g}", f"{rate / report['results'][0]['images_per_second']:.2f}")
    return shown


if __name__ == "__main__":
    typer.run(main)

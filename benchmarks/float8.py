"""How much time float8 could save in a training step: `python benchmarks/float8.py`, on a GPU with float8 matrix units.

It times the matrix products of a network's blocks in bf16 and in float8 (e4m3, one scale for each tensor), forward and for both
gradients, and the additional work of float8: the largest value of each tensor, and the conversion. A float8 product reads its
second factor column by column, so the gradients need transposed copies too. The estimate assumes that the optimiser, attention
and everything between products take the same time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from measuring import Result, heading, machine, parse_case, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit import models
from dit.devices import resolve_device
from dit.models.dit.network import DiT
from dit.models.layers import MLP_RATIO

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
REPEATS = 20
KINDS = ("bf16_ms", "float8_ms", "casts_ms")


class Product(NamedTuple):
    """A linear layer of a block: its name, and its numbers of inputs and outputs."""

    name: str
    inputs: int
    outputs: int


def main(
    case: Annotated[str, typer.Option(help="MODEL:BATCH@LATENT")] = "DiT-XL/2:128@32",
    step_ms: Annotated[float, typer.Option(help="a training step of the fused path, from benchmarks/train.py")] = 191.6,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Measure the products of one block, and compute what a step would take."""
    device = resolve_device("cuda")
    chosen = parse_case(case)
    with torch.device("meta"):
        network = models.build(chosen.name, latent_size=chosen.size, latent_channels=4, num_classes=1000, learn_sigma=True)
    assert isinstance(network, DiT)
    width, tokens = network.hidden_size, chosen.batch * (chosen.size // network.patch_size) ** 2
    products = [
        Product("qkv", width, 3 * width),
        Product("attn_out", width, width),
        Product("mlp_in", width, MLP_RATIO * width),
        Product("mlp_out", MLP_RATIO * width, width),
    ]
    report: Result = {"machine": machine(device), "case": case, "tokens": tokens, "depth": network.depth, "products": {}}
    for product in products:
        report["products"][product.name] = measured(product, tokens, device)
        write(report, output)
    every = report["products"].values()
    totals = {kind: network.depth * sum(row[kind] for row in every) for kind in KINDS}
    projected = step_ms - totals["bf16_ms"] + totals["float8_ms"] + totals["casts_ms"]
    report |= {"of_a_step": totals, "step_ms": step_ms, "projected_step_ms": projected}
    report |= {"images_per_second": chosen.batch / step_ms * 1e3, "projected_images_per_second": chosen.batch / projected * 1e3}
    write(report, output)
    Console(width=120).print(table(report))


def measured(product: Product, tokens: int, device: torch.device) -> Result:
    """Milliseconds of the layer's three products in bf16 and in float8, and of the conversions that float8 needs."""
    x = torch.randn(tokens, product.inputs, device=device).bfloat16()
    gradient = torch.randn(tokens, product.outputs, device=device).bfloat16()
    weight = torch.randn(product.outputs, product.inputs, device=device).bfloat16()
    both = torch.compile(converted, dynamic=False)
    (x8, x8t), (g8, g8t), (w8, w8t) = (both(tensor)[:2] for tensor in (x, gradient, weight))
    one = torch.ones((), device=device)

    def multiply(left: Tensor, right: Tensor, fast: bool = False) -> Tensor:
        return torch._scaled_mm(left, right.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return {
        "bf16_ms": milliseconds(lambda: (x @ weight.T, gradient @ weight, gradient.T @ x)),
        "float8_ms": milliseconds(lambda: (multiply(x8, w8, fast=True), multiply(g8, w8t), multiply(g8t, x8t))),
        "casts_ms": milliseconds(lambda: (both(x), both(gradient), both(weight))),
    }


def converted(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in float8, its transpose in float8, and the factor by which both were multiplied."""
    scale = LARGEST / tensor.abs().amax().float()
    scaled = (tensor.float() * scale).to(FLOAT8)
    return scaled, scaled.T.contiguous(), scale


def milliseconds(work: Callable[[], object]) -> float:
    """The median time of `work` on the device."""
    for _ in range(3):
        work()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def table(report: Result) -> Table:
    """The results as a table for a terminal."""
    shown = Table(
        "layer", "bf16, ms", "float8, ms", "conversions, ms", title=f"{heading(report)}; one block of {report['case']}"
    )
    for name, row in report["products"].items():
        shown.add_row(name, *(f"{row[kind]:.3f}" for kind in KINDS))
    shown.add_row(f"{report['depth']} blocks", *(f"{value:.1f}" for value in report["of_a_step"].values()))
    before, after = report["images_per_second"], report["projected_images_per_second"]
    shown.caption = f"images/s: {before:.0f} now, {after:.0f} if nothing else changed"
    return shown


if __name__ == "__main__":
    typer.run(main)

"""Estimate the time of a run on many GPUs from measurements on one: `python benchmarks/plan.py`; docs/scaling.md explains it.

Step times are results of `benchmarks/train.py`. The speeds of links and disks are assumptions, which options can change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from measuring import CHANNELS, CLASSES, Result, write
from rich.console import Console
from rich.table import Table

from dit import models

RESULTS = Path(__file__).parent / "results" / "train-h100.json"
GPUS_OF_A_HOST = 8
IMAGENET = 1_281_167
"""Training images of ImageNet-1k; Russakovsky et al. (2015), table 2."""
EVALUATED = 50_000
"""The usual number of samples for a Fréchet distance; Dhariwal & Nichol (2021), section 2.2."""
BF16, FP32 = 2, 4
STATE = 4
"""How many float32 numbers a checkpoint holds for each weight: the weight, two moments of Adam, and the average."""


def main(
    name: Annotated[str, typer.Option("--model", help="a network that was measured")] = "DiT-XL/2",
    results: Annotated[Path, typer.Option(help="what benchmarks/train.py wrote on one GPU")] = RESULTS,
    gpus: Annotated[str, typer.Option(help="numbers of GPUs, separated by spaces")] = "1 8 64",
    epochs: Annotated[float, typer.Option(help="80 are the published 400 thousand steps of 256")] = 80,
    link: Annotated[float, typer.Option(help="GB/s of an all-reduce within a host (bus bandwidth)")] = 330,
    network: Annotated[float, typer.Option(help="GB/s of an all-reduce across hosts, each GPU with a 400 Gbit/s port")] = 40,
    disk: Annotated[float, typer.Option(help="GB/s of a checkpoint's way to disk")] = 2,
    forward: Annotated[float, typer.Option(help="share of a training step's time that its forward pass takes")] = 0.3,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Tell what one step, one run, a checkpoint and an evaluation should take for each number of GPUs."""
    rows = {row["model"]: row for row in json.loads(results.read_text())["results"] if row["backend"] == "auto"}
    if name not in rows:
        raise typer.BadParameter(f"{name}: expected one of {', '.join(rows)}, as in {results}", param_hint="--model")
    measured = rows[name]
    weights = parameters(name, measured["latent_size"])
    report: Result = {"model": name, "parameters": weights, "batch_per_gpu": measured["batch_size"], "plans": []}
    for count in map(int, gpus.split()):
        report["plans"].append(plan(measured, weights, count, epochs, link, network, disk, forward))
    write(report, output)
    Console(width=130).print(table(report))


def parameters(name: str, size: int) -> int:
    """The number of weights of a network."""
    with torch.device("meta"):
        network = models.build(name, latent_size=size, latent_channels=CHANNELS, num_classes=CLASSES, learn_sigma=True)
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def plan(
    measured: Result, weights: int, count: int, epochs: float, link: float, network: float, disk: float, forward: float
) -> Result:
    """The estimate for `count` GPUs, with the measured batch on each GPU.

    An all-reduce of V bytes sends 2 (n - 1) / n V through every GPU, a reduce-scatter or an all-gather half as much (Patarasuk
    & Yuan 2009). DDP reduces bf16 gradients in one call after the backward pass, so all of this time adds to the step. FSDP
    gathers bf16 weights twice and scatters float32 gradients while blocks compute.
    """
    step = measured["milliseconds_per_step"] / 1e3
    bandwidth = (link if count <= GPUS_OF_A_HOST else min(link, GPUS_OF_A_HOST * network)) * 1e9
    share = (count - 1) / count
    ddp, fsdp = 2 * share * BF16 * weights, share * (2 * BF16 + FP32) * weights
    seconds = step + ddp / bandwidth
    batch = count * measured["batch_size"]
    rate = batch / seconds
    pixels = CHANNELS * measured["latent_size"] ** 2
    return {
        "gpus": count,
        "batch": batch,
        "ddp_gb_per_gpu": ddp / 1e9,
        "ddp_ms": 1e3 * ddp / bandwidth,
        "efficiency": step / seconds,
        "fsdp_gb_per_gpu": fsdp / 1e9,
        "fsdp_ms": 1e3 * fsdp / bandwidth,
        "images_per_second": rate,
        "hours": epochs * IMAGENET / rate / 3600,
        "mb_per_second": rate * 2 * BF16 * pixels / 1e6,  # mean and deviation of one view, stored as float16
        "checkpoint_gb": STATE * FP32 * weights / 1e9,
        "checkpoint_seconds": STATE * FP32 * weights / disk / 1e9,
        "evaluation_minutes": EVALUATED * 250 * 2 * forward * step / measured["batch_size"] / count / 60,
    }


def table(report: Result) -> Table:
    """The plans side by side."""
    rows = {
        "global batch": ("batch", "{:,}"),
        "DDP: GB through each GPU a step": ("ddp_gb_per_gpu", "{:.2f}"),
        "DDP: ms that it adds to a step": ("ddp_ms", "{:.1f}"),
        "DDP: efficiency": ("efficiency", "{:.1%}"),
        "FSDP: GB through each GPU a step": ("fsdp_gb_per_gpu", "{:.2f}"),
        "FSDP: ms of it, if none is hidden": ("fsdp_ms", "{:.1f}"),
        "DDP: images/s": ("images_per_second", "{:,.0f}"),
        "DDP: hours of the run": ("hours", "{:.1f}"),
        "MB/s of latents (float16)": ("mb_per_second", "{:.0f}"),
        "checkpoint, GB": ("checkpoint_gb", "{:.1f}"),
        "checkpoint, s": ("checkpoint_seconds", "{:.1f}"),
        "50,000 samples, 250 steps, guided: minutes": ("evaluation_minutes", "{:.0f}"),
    }
    head = f"{report['model']}, {report['parameters']:,} weights, {report['batch_per_gpu']} images a GPU"
    shown = Table(head, *(f"{row['gpus']} GPU{'s' if row['gpus'] > 1 else ''}" for row in report["plans"]))
    for label, (key, form) in rows.items():
        shown.add_row(label, *(form.format(row[key]) for row in report["plans"]))
    return shown


if __name__ == "__main__":
    typer.run(main)

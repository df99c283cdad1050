"""The share of training time that diagnostics take: `python benchmarks/diagnostics.py [--model DiT-S/2]`.

Trains on random latents with the study's own training loop. Windows of steps with one diagnosed step alternate with windows
without any, so that both see the machine in the same state; the difference of their medians is the time of one diagnosis.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from measuring import Result, heading, machine, random_latents, shipped, wait, write
from rich.console import Console
from rich.table import Table

from dit import config, init, models, sections
from dit.data.latents import LatentStore
from dit.devices import make_deterministic, resolve_device
from dit.diffusion import Diffusion
from dit.training.loop import EARLY_DIAGNOSES, Trainer

PUBLISHED_LATENT_SIZE = 32
"""The latent size of an image of 256 pixels with a published autoencoder."""


def main(
    name: Annotated[str | None, typer.Option("--model", help="A network such as DiT-S/2. [default: the study's]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="[default: the study's]")] = None,
    latent_size: Annotated[int | None, typer.Option(min=1, help="[default: the study's; 32 for another network]")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Steps in a window. [default: 1 on a CPU, else 10]")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Windows of each kind.")] = 15,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Measure what diagnostics cost."""
    params = shipped()
    own = name in (None, params.model.name)
    where = resolve_device(device)
    window = window or (1 if where.type == "cpu" else 10)  # a GPU works on while the host runs ahead
    make_deterministic(params.train.threads, params.train.deterministic)
    with tempfile.TemporaryDirectory() as scratch:
        size = latent_size or (params.latent_size if own else PUBLISHED_LATENT_SIZE)
        store = random_latents(Path(scratch) / "latents", size, train=256, validation=8)
        run = trainer(params, name or params.model.name, batch_size or params.train.batch_size, where, window, store)
        plain, diagnosed = windows(run, window, repeats)
    found = costs(params.train, plain, diagnosed, window)
    report = {
        "machine": machine(where),
        "model": name or params.model.name,
        "tokens": (store.latent_size // run.model.patch_size) ** 2,
        "batch_size": run.params.batch_size,
        "precision": str(run.precision).removeprefix("torch."),
        "backend": run.backend,
        "window": window,
        "repeats": repeats,
        **found,
    }
    write(report, output)
    Console().print(table(report))


def trainer(
    params: config.Params, name: str, batch_size: int, device: torch.device, window: int, store: LatentStore
) -> Trainer:
    """A run that diagnoses the first step of every second window."""
    size = {"latent_size": store.latent_size, "latent_channels": store.latent_channels}
    network = models.build(name, **size, num_classes=store.num_classes, learn_sigma=params.diffusion.learn_sigma)
    init.apply(network, params.study.baseline, 0)
    settings = params.train.model_copy(update={"batch_size": batch_size, "diagnose_every": 2 * window})
    diffusion = Diffusion(params.diffusion, device)
    return Trainer(network, store, diffusion, settings, label_dropout=params.model.label_dropout, seed=0, scratch=Path())


def windows(run: Trainer, window: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each plain window and of each diagnosed window, after the first steps, which are all diagnosed."""
    taken: tuple[list[float], list[float]] = ([], [])
    warm = -(-EARLY_DIAGNOSES // (2 * window)) * 2 + 2  # complete pairs of windows, the last pair like those that count
    for index in range(warm + 2 * repeats):
        wait(run.diffusion.device)
        started = time.perf_counter()
        for step in range(index * window, (index + 1) * window):
            run._train(step)
        wait(run.diffusion.device)
        if index >= warm:
            taken[index % 2 == 0].append(time.perf_counter() - started)
    return taken


def costs(train: sections.TrainParams, plain: list[float], diagnosed: list[float], window: int) -> Result:
    """Milliseconds of a step and of a diagnosis, and the shares of training time that diagnoses take."""
    step = statistics.median(plain) / window
    diagnosis = statistics.median(diagnosed) - statistics.median(plain)
    early = sum(number % train.diagnose_every > 0 for number in range(min(EARLY_DIAGNOSES, train.steps)))
    count = -(-train.steps // train.diagnose_every) + early
    return {
        "step_ms": step * 1e3,
        "diagnosis_ms": diagnosis * 1e3,
        "diagnosis_in_steps": diagnosis / step,
        "diagnose_every": train.diagnose_every,
        "share": share(diagnosis, step * train.diagnose_every),
        "study_steps": train.steps,
        "study_diagnoses": count,
        "study_share": share(diagnosis * count, step * train.steps),
    }


def share(part: float, rest: float) -> float:
    """The share of `part` in the sum of both."""
    return part / (part + rest)


def table(found: Result) -> Table:
    """The results as a table for a terminal."""
    rows = {
        "network": f"{found['model']}, {found['tokens']} tokens, batch of {found['batch_size']}, "
        f"{found['precision']}, {found['backend']}",
        "device": f"{heading(found)}, {found['machine']['threads']} threads",
        "one step": f"{found['step_ms']:.1f} ms",
        "one diagnosis": f"{found['diagnosis_ms']:.1f} ms, {found['diagnosis_in_steps']:.0%} of a step",
        f"share, one in {found['diagnose_every']} steps": f"{found['share']:.2%} of training time",
        f"share, {found['study_diagnoses']} in {found['study_steps']} steps": f"{found['study_share']:.2%} of the study's run",
    }
    shown = Table("diagnostics", f"medians of {found['repeats']} windows of {found['window']} steps", show_header=True)
    for label, value in rows.items():
        shown.add_row(label, value)
    return shown


if __name__ == "__main__":
    typer.run(main)

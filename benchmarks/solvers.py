"""How fewer solver steps change the quality of samples: `make study`, then `python benchmarks/solvers.py` in the same folder.

Each solver samples the trained networks of the study's baseline from the same noise and labels, and the samples are compared
with the real validation images as in stage `evaluate`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from measuring import Result, machine, write
from rich.console import Console
from rich.table import Table

from dit import config
from dit.autoencoder import load_autoencoder
from dit.data.latents import LatentStore
from dit.design import design
from dit.devices import make_deterministic, resolve_device
from dit.distributed import Ranks
from dit.evaluation.distances import sample_distances
from dit.evaluation.features import load_extractor, load_features
from dit.evaluation.samples import draw, load_network, look
from pipelines import experiments
from pipelines.records.training import TRAIN

SOLVERS = "ddpm:250 ddim:50 dpmsolver++:20 dpmsolver++:10"
SHOWN = ("frechet_distance", "kernel_distance", "precision", "recall")


def main(
    solvers: Annotated[str, typer.Option(help="SOLVER:STEPS, separated by spaces")] = SOLVERS,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Sample with each solver; tell the distances, as means over seeds, and the seconds of sampling and its preparation."""
    params = config.load()
    strategy = params.study.baseline
    first = design(params.study).settings(strategy)[0]
    device = resolve_device(params.evaluate.device)
    make_deterministic(params.evaluate.threads)
    store, extractor = LatentStore("data/latents"), load_extractor(params.features, device)
    real = load_features("data/features", extractor)
    autoencoder, ranks = load_autoencoder("data/autoencoder", device), Ranks(device)
    about = {"strategy": strategy, "model": params.model.name, "samples": params.evaluate.num_samples, "real": len(real)}
    report: Result = {"machine": machine(device), **about, "results": []}
    for solver in solvers.split():
        scheduler, _, steps = solver.partition(":")
        overrides = {"evaluate.scheduler": scheduler, "evaluate.steps": int(steps)}
        chosen = experiments.parameters(Path.cwd(), overrides)
        for run in (run for run in design(params.study).runs if run.strategy == strategy and run.setting == first):
            started = time.monotonic()
            network = load_network(chosen, store, TRAIN / run.name / "ema.safetensors").to(device)
            latents = store.denormalize(draw(network, chosen, store.num_classes, ranks, f"sample {run.name}"))
            seconds = time.monotonic() - started
            seen = look(latents, autoencoder, extractor, chosen.evaluate, store.num_classes, ranks)
            if seen is None:
                raise SystemExit(f"error: samples of {run.name} by {solver} are not finite, so they have no distances")
            distances = vars(sample_distances(real, seen.features, chosen.evaluate))
            row = {
                "solver": scheduler,
                "steps": int(steps),
                "timestep_spacing": chosen.evaluate.timestep_spacing,
                "seed": run.seed,
            }
            report["results"].append({**row, "seconds": seconds, **distances})
            write(report, output)
    Console(width=120).print(table(report))


def table(report: Result) -> Table:
    """A table of means over seeds, and of the spread between seeds."""
    shown = Table("solver", "steps", *(name.replace("_", " ") for name in SHOWN), "seconds a seed")
    shown.title = f"{report['model']}, {report['strategy']}: {report['samples']} samples, {report['real']} real images"
    for solver, steps in dict.fromkeys((row["solver"], row["steps"]) for row in report["results"]):
        rows = [row for row in report["results"] if (row["solver"], row["steps"]) == (solver, steps)]
        cells = []
        for name in (*SHOWN, "seconds"):
            values = [row[name] for row in rows]
            cells.append(f"{sum(values) / len(values):.4g} ± {(max(values) - min(values)) / 2:.2g}")
        shown.add_row(solver, str(steps), *cells)
    return shown


if __name__ == "__main__":
    typer.run(main)

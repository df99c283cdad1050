"""Whether a fast path trains as well as plain float32: `python benchmarks/precision.py`.

Both train on the same batches, from the same weights. Their loss curves differ by rounding; this difference is compared with
the difference between the curves of different seeds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from measuring import Result, heading, machine, random_latents, write
from rich.console import Console
from rich.table import Table
from train import build

from dit.data.latents import LatentStore
from dit.devices import make_deterministic, resolve_device

PLAIN = "fp32 eager"
VARIANTS = {"cuda": (PLAIN, "bf16 auto"), "cpu": (PLAIN, "bf16 eager")}
SMOOTHED = 50
"""Training errors are means over this many logged steps, because the error of one step depends mostly on its timesteps."""


def main(
    name: Annotated[str, typer.Option("--model", help="[default: DiT-Tiny/2, or DiT-Micro/2 on a CPU]")] = "",
    size: Annotated[int | None, typer.Option(help="height and width of random latents [default: 32, or 8 on a CPU]")] = None,
    latents: Annotated[Path | None, typer.Option(help="a study's data/latents, instead of random ones")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    steps: Annotated[int, typer.Option(min=200)] = 2000,
    seeds: Annotated[int, typer.Option(min=2)] = 3,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Train every variant with every seed, and compare the curves with those of plain float32."""
    device = resolve_device("auto")
    make_deterministic(torch.get_num_threads(), deterministic=False)  # with all kernels that a fast run has
    usual, pixels = ("DiT-Tiny/2", 32) if device.type == "cuda" else ("DiT-Micro/2", 8)
    network = name or usual
    report: Result = {"machine": machine(device), "latents": str(latents) if latents else "random", "model": network}
    report |= {"batch_size": batch_size, "steps": steps, "seeds": seeds}
    found: dict[str, list[pd.DataFrame]] = {}
    with tempfile.TemporaryDirectory() as directory:
        store = LatentStore(latents) if latents else random_latents(Path(directory) / "latents", size or pixels)
        for variant in VARIANTS[device.type]:
            precision, backend = variant.split()
            for seed in range(seeds):
                changes = {"steps": steps, "log_every": 1, "validate_every": steps // 10, "precision": precision}
                run = build(network, batch_size, store, backend, device, Path(directory) / "scratch", seed=seed, **changes)
                run.run(f"{variant}, seed {seed}")
                found.setdefault(variant, []).append(curves(run.records.metrics, run.records.validation))
            report["variants"] = {variant: compared(runs, found[PLAIN]) for variant, runs in found.items()}
            write(report, output)
    Console(width=130).print(table(report))


def curves(metrics: list[Result], validation: list[Result]) -> pd.DataFrame:
    """Errors by step: of training, smoothed, and of validation at the validated steps."""
    training = pd.DataFrame(metrics).set_index("step")["mse"].rolling(SMOOTHED).mean()
    rows = pd.DataFrame(validation)
    measured = rows[rows["weights"] == "model"].set_index("step")["mse"]
    return pd.DataFrame({"training": training, "validation": measured})


def compared(runs: list[pd.DataFrame], plain: list[pd.DataFrame]) -> Result:
    """By curve: errors at the end, and the RMS difference of the curves to float32, in standard deviations over seeds."""
    result: Result = {}
    for curve in ("training", "validation"):
        ours, theirs = (np.stack([run[curve].dropna() for run in group]) for group in (runs, plain))
        late = ours.shape[1] // 10  # the first tenth falls from one to a fraction of it
        noise = theirs[:, late:].std(axis=0, ddof=1)
        difference = np.abs(ours - theirs)[:, late:]
        result[curve] = {
            "last": ours[:, -1].tolist(),
            "mean_difference": float((ours - theirs)[:, -1].mean()),
            "root_mean_square_in_seed_deviations": float(np.sqrt(np.mean(difference**2) / np.mean(noise**2))),
        }
    return result


def table(report: Result) -> Table:
    """A table of the variants compared with float32."""
    shown = Table("variant", "curve", "error at the end, by seed", "mean difference", "rms difference / deviation over seeds")
    shown.title = f"{heading(report)}; {report['model']}, {report['steps']} steps of {report['batch_size']}"
    for variant, found in report["variants"].items():
        for curve, row in found.items():
            ends = ", ".join(f"{last:.4f}" for last in row["last"])
            cells = [f"{row['mean_difference']:+.1e}", f"{row['root_mean_square_in_seed_deviations']:.3f}"]
            shown.add_row(variant, curve, ends, *cells)
    return shown


if __name__ == "__main__":
    typer.run(main)

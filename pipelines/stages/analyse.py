"""Stage `analyse@<strategy>`: what a strategy does at its start, before any training."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import typer

from dit.analysis.signal import width_exponent
from dit.analysis.start import Examiner
from dit.analysis.wakeup import awake
from dit.config import Params
from dit.data.latents import LatentStore
from dit.devices import float64_device, make_deterministic, resolve_device
from dit.diffusion import Diffusion
from pipelines.stages.entry import complete_directory, run_key, run_stage, strategy_of, write_json


def analyse(params: Params, strategy: str) -> None:
    """Examine one strategy on the study's network and latents, and write `runs/analyse/<strategy>`."""
    settings, rules = params.analyse, strategy_of(params, strategy)
    make_deterministic(settings.threads)
    device = float64_device(resolve_device(settings.device))
    identity = {
        "model": params.model.model_dump(mode="json"),
        "diffusion": params.diffusion.model_dump(mode="json"),
        "analyse": settings.model_dump(mode="json"),
        "optimiser": {"learning_rate": params.train.learning_rate, "betas": params.train.betas},
        "rules": rules.resolved,
    }
    store = LatentStore(Path("data/latents"))
    network = params.network(store.sizes)
    examine = Examiner(
        network,
        store,
        Diffusion(params.diffusion, device),
        settings,
        label_dropout=params.model.label_dropout,
        learning_rate=params.train.learning_rate,
        betas=params.train.betas,
    )
    found = examine(rules)
    agrees = found.predicted == found.measured
    described = {
        "strategy": strategy,
        "run_key": run_key("analyse", [identity, device.type], strategy),
        "awake_step": awake(found.measured),
        "predicted_equals_measured": agrees,
        "predicted": found.predicted,
        "measured": found.measured,
        "signal": asdict(found.signal),
        "early": [asdict(step) for step in found.early],
        "width_exponent": width_exponent(found.coordinates),
    }
    with complete_directory(f"runs/analyse/{strategy}") as out:
        write_json(out / "start.json", finite(described))
        pd.DataFrame(found.gradients).to_csv(out / "gradients.csv", index=False, lineterminator="\n")
        pd.DataFrame(found.coordinates).to_csv(out / "coordinates.csv", index=False, lineterminator="\n")
    schedule = "as predicted" if agrees else "NOT as predicted"
    print(f"analyse {strategy}: every role receives a gradient from step {awake(found.measured)} on, {schedule}")


def finite(value: Any) -> Any:
    """The same JSON-able value with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(strategy: str) -> None:
    """Examine STRATEGY of params.yaml at its start."""
    run_stage(lambda params: analyse(params, strategy))


if __name__ == "__main__":
    typer.run(main)

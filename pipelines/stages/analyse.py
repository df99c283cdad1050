"""Stage `analyse@<strategy>`: what a strategy does at its start, before any training."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import typer

from dit.analysis.signal import width_exponent
from dit.analysis.start import Examiner
from dit.analysis.wakeup import awake
from dit.config import Params
from dit.data.latents import LatentStore
from dit.devices import float64_device, make_deterministic, resolve_device
from dit.diffusion import Diffusion
from pipelines.files import complete_directory
from pipelines.records.analysis import ANALYSE, COORDINATES, GRADIENTS, StartRecord
from pipelines.stages.entry import run_dvc_stage, run_key, strategy_of


def analyse(params: Params, strategy: str) -> None:
    """Examine one strategy on the study's network and latents, and write `runs/analyse/<strategy>`."""
    settings, rules = params.analyse, strategy_of(params, strategy)
    make_deterministic(settings.threads)
    device = float64_device(resolve_device(settings.device))
    identity = {
        "model": params.model.model_dump(mode="json"),
        "diffusion": params.diffusion.model_dump(mode="json"),
        "analyse": settings.model_dump(mode="json"),
        "learning_rate": params.train.learning_rate,
        "optimizer": params.train.optimizer.model_dump(mode="json"),
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
        optimizer=params.train.optimizer,
    )
    found = examine(rules)
    agrees = None if found.predicted is None else found.predicted == found.measured
    record = StartRecord(
        strategy=strategy,
        run_key=run_key("analyse", [identity, device.type], strategy),
        awake_step=awake(found.measured),
        predicted_equals_measured=agrees,
        predicted=found.predicted,
        not_predicted=found.not_predicted,
        measured=found.measured,
        signal=found.signal,
        early=found.early,
        width_exponent=width_exponent(found.coordinates),
    )
    with complete_directory(ANALYSE / strategy) as out:
        record.write(out)
        GRADIENTS.write_frame(out, pd.DataFrame(found.gradients))
        COORDINATES.write_frame(out, pd.DataFrame(found.coordinates))
    schedule = {True: "as predicted", False: "NOT as predicted", None: "measured, not predicted"}[agrees]
    print(f"analyse {strategy}: every role receives a gradient from step {awake(found.measured)} on, {schedule}")


def main(strategy: str) -> None:
    """Examine STRATEGY of params.yaml at its start."""
    run_dvc_stage(lambda params: analyse(params, strategy))


if __name__ == "__main__":
    typer.run(main)

"""Stage `analyse@<strategy>`: what a strategy does at its start, before any training."""

from __future__ import annotations

import pandas as pd

from dit.analysis.signal import width_exponent
from dit.analysis.start import Examiner
from dit.analysis.wakeup import awake
from dit.config import Params
from dit.data.latents import LatentStore
from dit.devices import float64_device, make_deterministic, resolve_device
from dit.diffusion import Diffusion
from pipelines.design import Item
from pipelines.files import complete_directory
from pipelines.records.analysis import COORDINATES, GRADIENTS, StartRecord
from pipelines.stages.entry import run_dvc_stage, run_key


def analyse(params: Params, item: Item) -> None:
    """Examine a strategy on the network and the latents of its setting, and write `runs/analyse/<key>`."""
    settings, rules = params.analyse, params.strategies[item.strategy]
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
    store = LatentStore(item.inputs["latents"])
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
        strategy=item.strategy,
        run_key=run_key(item, [identity, device.type]),
        awake_step=awake(found.measured),
        predicted_equals_measured=agrees,
        predicted=found.predicted,
        not_predicted=found.not_predicted,
        measured=found.measured,
        signal=found.signal,
        early=found.early,
        width_exponent=width_exponent(found.coordinates),
    )
    with complete_directory(item.out) as out:
        record.write(out)
        GRADIENTS.write_frame(out, pd.DataFrame(found.gradients))
        COORDINATES.write_frame(out, pd.DataFrame(found.coordinates))
    schedule = {True: "as predicted", False: "NOT as predicted", None: "measured, not predicted"}[agrees]
    print(f"analyse {item.key}: every role receives a gradient from step {awake(found.measured)} on, {schedule}")


if __name__ == "__main__":
    run_dvc_stage(analyse, "analyse")

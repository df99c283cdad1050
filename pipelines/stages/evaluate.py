"""Stage `evaluate@<run>`: sample one trained DiT, decode, and measure against the real validation images."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from dit import design as designs
from dit.autoencoder import load_autoencoder
from dit.config import Params
from dit.data.latents import LatentStore
from dit.design import Run
from dit.devices import make_deterministic, resolve_device
from dit.distributed import Ranks, joined
from dit.errors import InputError
from dit.evaluation.distances import Distances, check_counts, sample_distances
from dit.evaluation.features import load_extractor, load_features
from dit.evaluation.samples import Seen, draw, load_network, look
from pipelines import design
from pipelines.design import Item
from pipelines.files import complete_directory, scratch
from pipelines.records.base import Timing
from pipelines.records.evaluation import EvaluateRecord, FeatureSpace
from pipelines.records.training import TRAIN, TrainRecord
from pipelines.stages.entry import run_dvc_stage, run_key


def evaluate(params: Params, item: Item) -> None:
    """Evaluate one training run and write `runs/evaluate/<run>`, or that of a strategy's best setting.

    A run that did not finish training, or whose samples are not finite, is a result too: it has no grid and no distances.
    """
    run = evaluated_run(params, item)
    params = params.with_values(run.setting.levels)
    inputs = {kind: design.data_folder(params, run, kind) for kind in design.EVALUATED}
    make_deterministic(params.evaluate.threads)
    trained = read_run(run, params)
    settings = {section: getattr(params, section).model_dump(mode="json") for section in ("evaluate", "features")}
    device = resolve_device(params.evaluate.device)
    key = run_key(item, [params.model.name, trained.settings.diffusion, settings, device.type])
    store = LatentStore(inputs["latents"])
    seen: Seen | None = None
    with joined(device) as ranks:
        extractor = load_extractor(params.features, ranks.device)
        real = load_features(inputs["features"], extractor)
        check_counts(len(real), params.evaluate)
        if trained.status == "finished":
            latents = store.denormalize(drawn(params, store, run.name, ranks, key))
            autoencoder = load_autoencoder(inputs["autoencoder"], ranks.device)
            seen = look(latents, autoencoder, extractor, params.evaluate, store.num_classes, ranks)
    if not ranks.is_main:
        return
    distances = sample_distances(real, seen.features, params.evaluate) if seen else None
    measured = vars(distances) if distances else dict.fromkeys(field.name for field in fields(Distances))
    record = EvaluateRecord(
        strategy=run.strategy,
        seed=run.seed,
        run=run.name,
        run_key=key,
        train_run_key=trained.run_key,
        status="diverged" if trained.status == "finished" and not seen else trained.status,
        num_generated=params.evaluate.num_samples,
        num_real=len(real),
        features=FeatureSpace(extractor=extractor.name, size=extractor.size),
        settings=settings,
        metrics={**measured, "validation_mse": trained.final.ema_validation_mse if trained.final else None},
    )
    with complete_directory(item.out) as out:
        record.write(out)
        if seen:
            seen.grid.save(out / "grid.png")
    counts = f"{params.evaluate.num_samples} generated and {len(real)} real images, {extractor.name}"
    print(f"evaluate {item.key}: {ending(trained, distances)} ({counts})")


def evaluated_run(params: Params, item: Item) -> Run:
    """The run that is evaluated: the one that the stage is named after, or the one that stage `best` chose."""
    runs = designs.design(params.study)
    chosen = Path(item.inputs["train"])
    if chosen.suffix != ".json":
        return runs.named(chosen.name)
    if not chosen.is_file():
        raise InputError(chosen)
    return runs.named(json.loads(chosen.read_text())["runs"][str(item.seed)])


def read_run(run: Run, params: Params) -> TrainRecord:
    """The record of a training run. Raises `InputError` where there is none, or it learned another diffusion."""
    directory = TRAIN / run.name
    record = TrainRecord.read(directory)
    if record.settings.diffusion != params.diffusion.model_dump(mode="json"):
        problem = f"was trained with {record.settings.diffusion}, not the diffusion of params.yaml"
        raise InputError(directory / TrainRecord.FILE, problem)
    return record


def drawn(params: Params, store: LatentStore, name: str, ranks: Ranks, key: str) -> Tensor:
    """Normalised latents (N, C, h, w) of the EMA weights; their speed goes to scratch."""
    network = load_network(params, store, TRAIN / name / "ema.safetensors").to(ranks.device)
    started = time.monotonic()
    latents = draw(network, params, store.num_classes, ranks, f"sample {name}")
    seconds = time.monotonic() - started
    if ranks.is_main:
        timing = Timing(seconds=seconds, images_per_second=len(latents) / seconds, hostname=socket.gethostname())
        timing.write(scratch(key))
    return latents


def ending(trained: TrainRecord, distances: Distances | None) -> str:
    """What a person wants to know of an evaluation that is over."""
    if trained.collapsed:
        return f"collapsed in training, at step {trained.collapsed.step}"
    if trained.diverged:
        return f"diverged in training: {vars(trained.diverged)}"
    if distances is None:
        return "diverged in sampling: latents are not finite"
    return ", ".join(f"{name} {value:.4g}" for name, value in vars(distances).items())


if __name__ == "__main__":
    run_dvc_stage(evaluate, "evaluate", "evaluate")

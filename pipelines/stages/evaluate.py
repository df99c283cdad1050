"""Stage `evaluate@<strategy>-<seed>`: sample one trained DiT, decode, and measure against the real validation images."""

from __future__ import annotations

import socket
import time
from dataclasses import fields
from typing import Annotated

import typer
from torch import Tensor

from dit.autoencoder import load_autoencoder
from dit.config import Params
from dit.data.latents import LatentStore
from dit.devices import make_deterministic, resolve_device
from dit.distributed import Ranks, joined
from dit.errors import InputError
from dit.evaluation.distances import Distances, check_counts, sample_distances
from dit.evaluation.features import load_extractor, load_features
from dit.evaluation.samples import Seen, draw, load_network, look
from pipelines.files import complete_directory, scratch
from pipelines.records.base import Timing
from pipelines.records.evaluation import EVALUATE, EvaluateRecord, FeatureSpace
from pipelines.records.training import TRAIN, TrainRecord
from pipelines.stages.entry import check_strategy, run_dvc_stage, run_key


def evaluate(params: Params, strategy: str, seed: int) -> None:
    """Evaluate `runs/train/<strategy>-<seed>` and write `runs/evaluate/<strategy>-<seed>`.

    A run that did not finish training, or whose samples are not finite, is a result too: it has no grid and no distances.
    """
    name = f"{strategy}-{seed}"
    make_deterministic(params.evaluate.threads)
    trained = read_run(strategy, seed, params)
    settings = {section: getattr(params, section).model_dump(mode="json") for section in ("evaluate", "features")}
    device = resolve_device(params.evaluate.device)
    key = run_key("evaluate", [params.model.name, trained.settings.diffusion, settings, device.type], strategy, seed)
    store = LatentStore("data/latents")
    seen: Seen | None = None
    with joined(device) as ranks:
        extractor = load_extractor(params.features, ranks.device)
        real = load_features("data/features", extractor)
        check_counts(len(real), params.evaluate)
        if trained.status == "finished":
            latents = store.denormalize(drawn(params, store, name, ranks, key))
            autoencoder = load_autoencoder("data/autoencoder", ranks.device)
            seen = look(latents, autoencoder, extractor, params.evaluate, store.num_classes, ranks)
    if not ranks.is_main:
        return
    distances = sample_distances(real, seen.features, params.evaluate) if seen else None
    measured = vars(distances) if distances else dict.fromkeys(field.name for field in fields(Distances))
    record = EvaluateRecord(
        strategy=strategy,
        seed=seed,
        run=name,
        run_key=key,
        train_run_key=trained.run_key,
        status="diverged" if trained.status == "finished" and not seen else trained.status,
        num_generated=params.evaluate.num_samples,
        num_real=len(real),
        features=FeatureSpace(extractor=extractor.name, size=extractor.size),
        settings=settings,
        metrics={**measured, "validation_mse": trained.final.ema_validation_mse if trained.final else None},
    )
    with complete_directory(EVALUATE / name) as out:
        record.write(out)
        if seen:
            seen.grid.save(out / "grid.png")
    counts = f"{params.evaluate.num_samples} generated and {len(real)} real images, {extractor.name}"
    print(f"evaluate {name}: {ending(trained, distances)} ({counts})")


def read_run(strategy: str, seed: int, params: Params) -> TrainRecord:
    """The record of a training run.

    Raises `ConfigError` for an unknown strategy, `InputError` where there is no such run, or it learned another diffusion.
    """
    check_strategy(params, strategy)
    directory = TRAIN / f"{strategy}-{seed}"
    run = TrainRecord.read(directory)
    if run.settings.diffusion != params.diffusion.model_dump(mode="json"):
        problem = f"was trained with {run.settings.diffusion}, not the diffusion of params.yaml"
        raise InputError(directory / TrainRecord.FILE, problem)
    return run


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


def main(strategy: str, seed: Annotated[int, typer.Argument(min=0)]) -> None:
    """Evaluate the DiT that was trained from STRATEGY of params.yaml with SEED."""
    run_dvc_stage(lambda params: evaluate(params, strategy, seed), "evaluate")


if __name__ == "__main__":
    typer.run(main)

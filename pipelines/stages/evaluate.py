"""Stage `evaluate@<run>`: sample one trained DiT, decode, and measure against the real validation images."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from dit import checksums, design as designs
from dit.autoencoder import load_autoencoder
from dit.checksums import sha256
from dit.config import Params
from dit.data.latents import LatentStore
from dit.design import Run
from dit.devices import make_deterministic, resolve_device
from dit.distributed import Ranks, joined
from dit.errors import InputError
from dit.evaluation import statistics
from dit.evaluation.counts import check_counts
from dit.evaluation.distances import Distances, sample_distances
from dit.evaluation.features import load_extractor, load_features
from dit.evaluation.literature import Figures, compare
from dit.evaluation.samples import Seen, draw, load_network, look
from dit.evaluation.statistics import Statistics
from pipelines import design
from pipelines.design import Item
from pipelines.files import complete_directory, scratch
from pipelines.records.base import Timing
from pipelines.records.evaluation import EvaluateRecord, FeatureSpace, ReferenceUsed
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
        reference = statistics.of_params(params.evaluate, extractor, params.features.batch_size)
        if trained.status == "finished":
            latents = store.denormalize(drawn(params, store, run.name, ranks, key))
            autoencoder = load_autoencoder(inputs["autoencoder"], ranks.device)
            seen = look(latents, autoencoder, extractor, params.evaluate, store.num_classes, ranks, reference is not None)
    if not ranks.is_main:
        return
    distances = sample_distances(real, seen.features, params.evaluate) if seen else None
    measured = vars(distances) if distances else dict.fromkeys(field.name for field in fields(Distances))
    if reference:
        measured = {**measured, **against_reference(seen, reference, params)}
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
        reference=reference_used(params, reference),
    )
    with complete_directory(item.out) as out:
        record.write(out)
        if seen:
            seen.grid.save(out / "grid.png")
    counts = f"{params.evaluate.num_samples} generated and {len(real)} real images, {extractor.name}"
    print(f"evaluate {item.key}: {ending(trained, distances)} ({counts})")


def against_reference(seen: Seen | None, reference: Statistics, params: Params) -> dict[str, float | None]:
    """The figures of published tables, by name; None for figures that the reference or the feature network does not allow."""
    if seen is None or seen.statistics is None:
        return {f"reference_{field.name}": None for field in fields(Figures)}
    figures = compare(seen.statistics, reference, params.evaluate.nearest_k)
    return {f"reference_{name}": value for name, value in vars(figures).items()}


def reference_used(params: Params, reference: Statistics | None) -> ReferenceUsed | None:
    """What the record says of the reference."""
    path = params.evaluate.reference
    if path is None or reference is None:
        return None
    features = None if reference.features is None else len(reference.features)
    return ReferenceUsed(file=path.name, sha256=sha256(path), count=reference.count, features=features)


def evaluated_run(params: Params, item: Item) -> Run:
    """The run that is evaluated: the one that the stage is named after, or the one that stage `best` chose."""
    runs = designs.design(params.study)
    chosen = Path(item.inputs["train"])
    if chosen.suffix != ".json":
        return runs.named(chosen.name)
    if not chosen.is_file():
        raise InputError(chosen)
    checksums.verify(chosen)
    return runs.named(json.loads(chosen.read_text())["runs"][str(item.seed)])


def read_run(run: Run, params: Params) -> TrainRecord:
    """The record of a training run. Raises `InputError` if it is missing, or if the run learned another diffusion."""
    directory = TRAIN / run.name
    record = TrainRecord.read(directory)
    if record.settings.diffusion != params.diffusion.model_dump(mode="json"):
        problem = f"was trained with {record.settings.diffusion}, not the diffusion of params.yaml"
        raise InputError(directory / TrainRecord.FILE, problem)
    return record


def drawn(params: Params, store: LatentStore, name: str, ranks: Ranks, key: str) -> Tensor:
    """Draw normalised latents (N, C, h, w) with the EMA weights; the sampling speed is written to scratch."""
    network = load_network(params, store, TRAIN / name / "ema.safetensors").to(ranks.device)
    started = time.monotonic()
    latents = draw(network, params, store.num_classes, ranks, f"sample {name}")
    seconds = time.monotonic() - started
    if ranks.is_main:
        timing = Timing(seconds=seconds, images_per_second=len(latents) / seconds, hostname=socket.gethostname())
        timing.write(scratch(key))
    return latents


def ending(trained: TrainRecord, distances: Distances | None) -> str:
    """The result of an evaluation in a line for the user."""
    if trained.collapsed:
        return f"collapsed in training, at step {trained.collapsed.step}"
    if trained.diverged:
        return f"diverged in training: {vars(trained.diverged)}"
    if distances is None:
        return "diverged in sampling: latents are not finite"
    return ", ".join(f"{name} {value:.4g}" for name, value in vars(distances).items())


if __name__ == "__main__":
    run_dvc_stage(evaluate, "evaluate", "evaluate")

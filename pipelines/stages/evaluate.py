"""Stage `evaluate@<strategy>-<seed>`: sample one trained DiT, decode, and measure against the real validation images."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

from dit.autoencoder import decode, load_autoencoder
from dit.config import Params
from dit.data.latents import LatentStore
from dit.devices import make_deterministic, resolve_device, resolve_precision
from dit.distributed import Ranks, joined
from dit.errors import ConfigError, DataError
from dit.evaluation.distances import Distances, check_counts, measure
from dit.evaluation.features import FeatureExtractor, load_extractor, load_features
from dit.evaluation.grids import grid_shape, image_grid
from dit.models import Denoiser, backend_for
from dit.progress import progress
from dit.sampling import Network, balanced_labels, sample
from pipelines.stages.entry import complete_directory, run_key, run_stage, scratch, write_json


def evaluate(params: Params, strategy: str, seed: int) -> None:
    """Evaluate `runs/train/<strategy>-<seed>` and write `runs/evaluate/<strategy>-<seed>`.

    A run that diverged in training, or whose samples are not finite, is a result too: it has no grid and no distances.
    """
    name = f"{strategy}-{seed}"
    make_deterministic(params.evaluate.threads)
    trained = read_run(strategy, seed, params)
    settings = {section: getattr(params, section).model_dump(mode="json") for section in ("evaluate", "features")}
    device = resolve_device(params.evaluate.device)
    identity = [params.model.name, trained["settings"]["diffusion"], settings, device.type]
    key = run_key("evaluate", identity, strategy, seed)
    store = LatentStore("data/latents")
    rows, columns = grid_shape(params.evaluate.num_samples, store.num_classes, params.evaluate.grid_rows)
    looked = None
    with joined(device) as ranks:
        extractor = load_extractor(params.features, ranks.device)
        real = load_features("data/features", extractor)
        check_counts(len(real), params.evaluate)
        latents = None if trained["status"] == "diverged" else draw(params, store, name, ranks, key)
        if latents is not None and latents.isfinite().all():
            looked = look(params, store.denormalize(latents), extractor, rows * store.num_classes, ranks)
    if not ranks.is_main:
        return
    distances: dict[str, float | None] = dict.fromkeys(field.name for field in fields(Distances))
    grid = None
    if looked:
        features, shown = looked
        grid = image_grid(shown, rows, columns, store.num_classes)
        distances |= vars(measure(real, features, params.evaluate))
    final = trained["final"] or {"ema_validation_mse": None}
    result = {
        "strategy": strategy,
        "seed": seed,
        "run_key": key,
        "train_run_key": trained["run_key"],
        "status": "finished" if grid else "diverged",
        "num_generated": params.evaluate.num_samples,
        "num_real": len(real),
        "features": {"extractor": extractor.name, "size": extractor.size},
        "settings": settings,
        "metrics": {**distances, "validation_mse": final["ema_validation_mse"]},
    }
    with complete_directory(f"runs/evaluate/{name}") as out:
        write_json(out / "metrics.json", result)
        if grid:
            grid.save(out / "grid.png")
    counts = f"{params.evaluate.num_samples} generated and {len(real)} real images, {extractor.name}"
    print(f"evaluate {name}: {ending(trained, distances)} ({counts})")


def read_run(strategy: str, seed: int, params: Params) -> dict[str, Any]:
    """`run.json` of a training run.

    Raises `ConfigError` for an unknown strategy, `DataError` where there is no such run, or it learned another diffusion.
    """
    if strategy not in params.strategies:
        raise ConfigError(f"unknown strategy '{strategy}'; expected one of {', '.join(params.strategies)}")
    path = Path(f"runs/train/{strategy}-{seed}/run.json")
    if not path.is_file():
        raise DataError(f"{path}: no such file; `dvc repro train@{strategy}-{seed}` makes it")
    run: dict[str, Any] = json.loads(path.read_text())
    if run["settings"]["diffusion"] != params.diffusion.model_dump(mode="json"):
        raise DataError(
            f"{path}: trained with {run['settings']['diffusion']}, not the diffusion of params.yaml; "
            f"`dvc repro train@{strategy}-{seed}` trains anew"
        )
    return run


def draw(params: Params, store: LatentStore, name: str, ranks: Ranks, key: str) -> Tensor:
    """Normalised latents (N, C, h, w) of the EMA weights; their speed goes to scratch."""
    network = load_network(params, store, Path("runs/train") / name / "ema.safetensors").to(ranks.device)
    settings = params.evaluate
    precision = resolve_precision(settings.precision, ranks.device)
    backend = backend_for(network, settings.backend, ranks.device, precision, "evaluate")
    started = time.monotonic()
    latents = sample(
        Network(network, backend),
        params.diffusion,
        balanced_labels(settings.num_samples, store.num_classes),
        settings,
        device=ranks.device,
        precision=precision,
        description=f"sample {name}",
        ranks=ranks,
    )
    seconds = time.monotonic() - started
    speed = {"seconds": seconds, "images_per_second": len(latents) / seconds, "hostname": socket.gethostname()}
    if ranks.is_main:
        scratch(key).mkdir(parents=True, exist_ok=True)
        write_json(scratch(key) / "timing.json", speed)
    return latents


def load_network(params: Params, store: LatentStore, weights: Path) -> Denoiser:
    """The network of the study with `weights`, in eval mode. Raises `DataError` for weights of another network."""
    network = params.network(store.sizes)
    try:
        network.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise DataError(f"{weights} is not of the network that params.yaml describes, so train again: {error}") from None
    return network.eval()


def look(params: Params, latents: Tensor, extractor: FeatureExtractor, keep: int, ranks: Ranks) -> tuple[Tensor, np.ndarray]:
    """Decode raw latents (N, C, h, w), a batch at a time: features (N, D), and pixels (`keep`, H, W, 3) uint8 of the first."""
    autoencoder = load_autoencoder("data/autoencoder", extractor.device)
    size = params.evaluate.batch_size * ranks.size
    features, shown = [], []

    def decoded(batch: Tensor) -> tuple[Tensor, Tensor]:
        images = decode(autoencoder, batch)
        return extractor(images), torch.from_numpy(images)

    with progress(len(latents), "decode", "image", shown=ranks.is_main) as bar:
        for start, batch in zip(range(0, len(latents), size), latents.split(size), strict=True):
            found, images = ranks.split(lambda own, batch=batch: decoded(batch[own]), len(batch))  # type: ignore[misc]
            features.append(found.cpu())
            shown.append(images[: max(0, keep - start)].cpu().numpy())
            bar.update(len(batch))
    return torch.cat(features), np.concatenate(shown)


def ending(trained: dict[str, Any], distances: dict[str, float | None]) -> str:
    """What a person wants to know of an evaluation that is over."""
    if trained["status"] == "diverged":
        return f"diverged in training: {trained['diverged']}"
    if distances["frechet_distance"] is None:
        return "diverged in sampling: latents are not finite"
    return ", ".join(f"{name} {value:.4g}" for name, value in distances.items())


def main(strategy: str, seed: Annotated[int, typer.Argument(min=0)]) -> None:
    """Evaluate the DiT that was trained from STRATEGY of params.yaml with SEED."""
    run_stage(lambda params: evaluate(params, strategy, seed), "evaluate")


if __name__ == "__main__":
    typer.run(main)

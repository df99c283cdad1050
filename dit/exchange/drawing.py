"""Images of a trained network: drawn, decoded and written one batch at a time, so memory does not limit their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from dit.autoencoder import decoder_for
from dit.devices import resolve_precision
from dit.distributed import Ranks
from dit.errors import ConfigError, DataError, explain
from dit.evaluation.archives import ImageArchive
from dit.exchange.trained import Trained
from dit.models import backend_for
from dit.sampling import Network, balanced_labels, sampled
from dit.sections import SCHEDULERS, EvaluateParams
from dit.timesteps import check_sampler

PUBLISHED: dict[str, Any] = {
    "num_samples": 16,
    "scheduler": "ddpm",
    "steps": 250,
    "timestep_spacing": "auto",
    "ddpm_variance": "fixed_large",
    "guidance_scale": 1.5,
    "guidance_channels": 3,
    "seed": 0,
    "batch_size": 32,
    "kernel_subset_size": 100,
    "kernel_subsets": 50,
    "nearest_k": 3,
    "grid_rows": 4,
    "processes": 1,
    "precision": "auto",
    "backend": "auto",
    "threads": 2,
    "device": "auto",
}
"""Settings if no study has others: those of facebookresearch/DiT `sample_ddp.py`, with guidance on three channels as in its
`forward_with_cfg`; neighbours for precision and recall as in OpenAI's guided-diffusion `evaluator.py`."""
FLOW = {"scheduler": "flow_euler", "guidance_channels": "all"}
EXPORT_STEPS = {"scheduler": "ddim", "steps": 50}
"""A sampler in place of ddpm, which `DiTPipeline` cannot reproduce: the scheduler and the number of steps."""


def settings_for(trained: Trained, base: Mapping[str, Any] | None, given: Mapping[str, Any]) -> EvaluateParams:
    """How samples are drawn: the values in `given` come first, then the study's (`base`), or else the published ones.

    Raises `ConfigError` for values that do not fit the network's diffusion.
    """
    flow = trained.diffusion.objective == "flow"
    chosen = {**(base or {**PUBLISHED, **(FLOW if flow else {})}), **given}
    chosen.setdefault("timestep_spacing", "auto")
    if "scheduler" in given and "timestep_spacing" not in given:
        chosen["timestep_spacing"] = "auto"
    channels = trained.network.latent_channels
    if base is None and "guidance_channels" not in given and chosen["guidance_channels"] != "all":
        chosen["guidance_channels"] = min(channels, chosen["guidance_channels"])
    try:
        settings = EvaluateParams.model_validate(chosen)
    except ValidationError as error:
        raise ConfigError(explain(error, "options", chosen)) from None
    diffusion = trained.diffusion
    fitting = SCHEDULERS[diffusion.objective]
    if settings.scheduler not in fitting:
        raise ConfigError(
            f"--scheduler {settings.scheduler}: {trained.name} predicts {diffusion.objective}; expected {', '.join(fitting)}"
        )
    betas = {"beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}
    try:
        check_sampler(
            settings.scheduler, settings.timestep_spacing, settings.steps, num_timesteps=diffusion.num_timesteps, **betas
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if settings.guidance_channels != "all" and settings.guidance_channels > channels:
        raise ConfigError(f"--guidance-channels {settings.guidance_channels}: the latents have {channels} channels")
    return settings


def labels_for(trained: Trained, count: int, classes: list[int] | None) -> Tensor:
    """Labels (count,) that cycle through `classes`, or through all classes. Raises `ConfigError` for an unknown class."""
    total = trained.network.num_classes
    if not classes:
        return balanced_labels(count, total)
    if wrong := [label for label in classes if not 0 <= label < total]:
        raise ConfigError(f"--class-labels {wrong[0]}: {trained.name} has the classes 0 to {total - 1}")
    return torch.tensor(classes)[torch.arange(count) % len(classes)]


def images(trained: Trained, labels: Tensor, settings: EvaluateParams, ranks: Ranks) -> Iterator[np.ndarray]:
    """One image for each of `labels` (N,), a batch at a time, in order: (B, H, W, C) uint8, on every rank.

    Raises `ConfigError` where no autoencoder is known, `DataError` for latents that are not finite.
    """
    if trained.autoencoder is None:
        raise ConfigError(
            f"{trained.name} draws latents, and no autoencoder for them is known here; give --vae with a directory in "
            "diffusers format, ema, mse, or a name on the hub"
        )
    precision = resolve_precision(settings.precision, ranks.device)
    network = trained.network.to(ranks.device)
    decode = decoder_for(trained.autoencoder.to(ranks.device), settings)
    backend = backend_for(network, settings.backend, ranks.device, precision, "evaluate")
    drawn = 0
    for latents in sampled(
        Network(network, backend),
        trained.diffusion,
        labels,
        settings,
        device=ranks.device,
        precision=precision,
        description=f"sample {trained.name}",
        ranks=ranks,
    ):
        if not latents.isfinite().all():
            raise DataError(f"{trained.name}: the samples from {drawn} on are not finite; its training diverged")
        raw = trained.denormalize(latents)

        def decoded(own: slice, raw: Tensor = raw) -> tuple[Tensor]:
            return (torch.from_numpy(decode(raw[own])).to(ranks.device),)

        drawn += len(latents)
        yield ranks.split(decoded, len(raw))[0].cpu().numpy()


def kept(batches: Iterator[np.ndarray], count: int, output: Path) -> Iterator[np.ndarray]:
    """Yield the same batches, and write each to the archive `output`. Call `check_output` before."""
    with ImageArchive(output, count) as archive:
        for batch in batches:
            archive.write(batch)
            yield batch


def check_output(output: Path, archive: bool = False) -> None:
    """Raise `ConfigError` if `output` exists already, or if it has to be an `archive` and has another suffix than `.npz`.

    Every process must call this before any process writes.
    """
    if archive and (output.suffix != ".npz" or output.exists()):
        raise ConfigError(f"--output {output}: expected a new file that ends in .npz")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output} is there already; remove it, or give another --output")


def save(batches: Iterator[np.ndarray], count: int, output: Path) -> None:
    """Write `count` images: as an archive (.npz), as a grid (.png), or else as PNG files `000000.png` and so on in a folder.

    Call `check_output` before.
    """
    if output.suffix == ".npz":
        with ImageArchive(output, count) as archive:
            for batch in batches:
                archive.write(batch)
    elif output.suffix == ".png":
        output.parent.mkdir(parents=True, exist_ok=True)
        _grid(np.concatenate(list(batches))).save(output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        index = 0
        for batch in batches:
            for image in batch:
                _picture(image).save(output / f"{index:06d}.png")
                index += 1


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _grid(pictures: np.ndarray) -> Image.Image:
    """Images (N, H, W, C) in a grid that is as square as possible; unused tiles are black."""
    count, height, width, channels = pictures.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    tiles = np.zeros((rows * columns, height, width, channels), np.uint8)
    tiles[:count] = pictures
    grid = (
        tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, columns * width, channels)
    )
    return _picture(grid)

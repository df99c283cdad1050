"""Samples of a trained network: draw latents, decode them, extract their features, and show some in a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dit import checksums
from dit.autoencoder import Autoencoder, decoder_for
from dit.config import Params
from dit.data.latents import LatentStore
from dit.devices import resolve_precision
from dit.distributed import Ranks
from dit.errors import InputError
from dit.evaluation.features import FeatureExtractor, Outputs
from dit.evaluation.grids import grid_shape, image_grid
from dit.evaluation.statistics import Gathered, Statistics
from dit.models import Denoiser, backend_for
from dit.progress import progress
from dit.sampling import Network, balanced_labels, sample
from dit.sections import EvaluateParams


def load_network(params: Params, store: LatentStore, weights: Path) -> Denoiser:
    """The network of the study with `weights`, in eval mode.

    Raises `InputError` for weights of another network, or a file that has changed since it was written.
    """
    checksums.verify(weights)
    network = params.network(store.sizes)
    try:
        network.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise InputError(weights, f"holds weights of another network than params.yaml describes: {error}") from None
    return network.eval()


def draw(network: Denoiser, params: Params, num_classes: int, ranks: Ranks, description: str) -> Tensor:
    """Draw normalised latents (N, C, h, w) as `params.evaluate` says, with all classes equally often."""
    settings = params.evaluate
    precision = resolve_precision(settings.precision, ranks.device)
    backend = backend_for(network, settings.backend, ranks.device, precision, "evaluate")
    return sample(
        Network(network, backend),
        params.diffusion,
        balanced_labels(settings.num_samples, num_classes),
        settings,
        device=ranks.device,
        precision=precision,
        description=description,
        ranks=ranks,
    )


@dataclass(frozen=True)
class Seen:
    """Decoded samples: the features (N, D) of all, and a grid of the first, one column for each class."""

    features: Tensor
    grid: Image.Image
    statistics: Statistics | None = None
    """The statistics of all samples, if `look` was called with `measure`."""


def look(
    latents: Tensor,
    autoencoder: Autoencoder,
    extractor: FeatureExtractor,
    params: EvaluateParams,
    num_classes: int,
    ranks: Ranks,
    measure: bool = False,
) -> Seen | None:
    """Decode raw latents (N, C, h, w) with balanced labels, one batch at a time, and extract their features.

    None if a latent is not finite, as when sampling diverged. With `measure`, also take the statistics that published tables
    need.
    """
    if not latents.isfinite().all():
        return None
    rows, columns = grid_shape(len(latents), num_classes, params.grid_rows)
    keep, size = rows * num_classes, params.batch_size * ranks.size
    features, shown = [], []
    gathered = Gathered()
    decode = decoder_for(autoencoder, params)

    def decoded(batch: Tensor) -> tuple[Tensor, ...]:
        images = decode(batch)
        seen = extractor.outputs(images) if measure else Outputs(extractor(images))
        others = (seen.spatial, seen.logits) if seen.spatial is not None and seen.logits is not None else ()
        return torch.from_numpy(images), seen.features, *others

    with progress(len(latents), "decode", "image", shown=ranks.is_main) as bar:
        for start, batch in zip(range(0, len(latents), size), latents.split(size), strict=True):
            images, found, *others = ranks.split(lambda own, batch=batch: decoded(batch[own]), len(batch))  # type: ignore[misc]
            features.append(found.cpu())
            if measure:
                gathered.add(Outputs(found.cpu(), *(each.cpu() for each in others)))
            shown.append(images[: max(0, keep - start)].cpu().numpy())
            bar.update(len(batch))
    grid = image_grid(np.concatenate(shown), rows, columns, num_classes)
    return Seen(torch.cat(features), grid, gathered.statistics("samples", extractor) if measure else None)

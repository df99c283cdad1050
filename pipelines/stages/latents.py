"""Stage `latents`: the posterior of every image, and the factor that gives latents unit variance."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from dit.autoencoder import Encoder, load_autoencoder
from dit.config import Params
from dit.data.images import load_images
from dit.data.latents import write_latents
from dit.devices import make_deterministic, resolve_backend, resolve_device, resolve_precision
from dit.distributed import Ranks, joined
from dit.fused.encoder import supports
from dit.fused.residual import NEEDS
from dit.sections import LatentsParams
from pipelines.design import Item
from pipelines.files import complete_directory
from pipelines.stages.entry import run_dvc_stage


def latents(params: Params, item: Item) -> None:
    """Encode the images with the autoencoder and write a folder of `data/latents`."""
    settings = params.latents
    make_deterministic(settings.threads)
    with joined(resolve_device(settings.device)) as ranks:
        normalize = encode_on(ranks, settings, item)
        if ranks.is_main:
            shift, scale = (" ".join(f"{value:.4g}" for value in normalize[name]) for name in ("shift", "scale"))
            print(f"latents: (z - shift) * scale with shift [{shift}], scale [{scale}]; from {normalize['source']}")


def encode_on(ranks: Ranks, settings: LatentsParams, item: Item) -> dict[str, Any]:
    """Encode this rank's part of the images; the main rank writes."""
    device = ranks.device
    autoencoder = load_autoencoder(item.inputs["autoencoder"], device)
    precision = resolve_precision(settings.precision, device)
    backend = resolve_backend(settings.backend, device, precision, supports(autoencoder), "latents", NEEDS)
    encoder = Encoder(autoencoder, precision, backend)
    with complete_directory(item.out) if ranks.is_main else nullcontext() as out:
        return write_latents(load_images(item.inputs["images"]), encoder, settings, out, ranks)


if __name__ == "__main__":
    run_dvc_stage(latents, "latents", "latents")

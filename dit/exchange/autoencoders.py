"""The autoencoder that belongs to a network, and how the latents of that network are normalised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from dit.autoencoder import Autoencoder, Pixels, load_autoencoder
from dit.autoencoder.files import from_pretrained
from dit.autoencoder.kinds import CLASSES
from dit.autoencoder.published import normalization
from dit.errors import ConfigError

PUBLISHED_AUTOENCODERS = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
"""The two autoencoders that facebookresearch/DiT `sample.py --vae` offers."""


Factors = tuple[float, ...]


def of_study(directory: Path, vae: str | None) -> Autoencoder | None:
    """The autoencoder that stage `autoencoder` wrote, or the one that `vae` names; None if there is none."""
    if vae is not None:
        return named(vae)
    return load_autoencoder(directory, "cpu") if directory.is_dir() else None


def exported(path: Path, about: Mapping[str, Any], vae: str | None) -> Autoencoder | None:
    """The autoencoder in a directory that `dit export` wrote; `about` is the directory's `dit.json`."""
    if about.get("pixels"):
        return Pixels(about["sizes"]["latent_channels"])
    if vae is None and not (path / "vae").is_dir():
        return None
    return named(vae or str(path / "vae"))


def published(vae: str | None, channels: int) -> tuple[Autoencoder | None, Factors, Factors]:
    """The autoencoder called `vae`, and the shift and scale of each channel that its config states; see `named`."""
    if vae is None:
        return None, (0.0,) * channels, (1.0,) * channels
    found = named(vae)
    stated, own = normalization(found.config), found.config["latent_channels"]
    if own != channels:
        raise ConfigError(f"--vae {vae} has {own} latent channels; the network expects {channels}")
    if stated is None:
        raise ConfigError(f"--vae {vae}: its config.json states no scaling_factor, without which latents have no scale")
    return found, tuple(stated["shift"]), tuple(stated["scale"])


def named(name: str) -> Autoencoder:
    """An autoencoder from a directory in diffusers format, alone or in a pipeline, or from the hub. Raises `ConfigError`."""
    path = PUBLISHED_AUTOENCODERS.get(name, name)
    options = {"subfolder": "vae"} if (Path(path) / "vae" / "config.json").is_file() else {}
    try:
        kind = AutoencoderKL.load_config(path, **options).get("_class_name")
        if kind not in CLASSES:
            raise ConfigError(f"--vae {name} holds a model of class {kind}; expected {' or '.join(CLASSES)}")
        return from_pretrained(kind, path, **options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        expected = "a directory in diffusers format, ema, mse, or a name on the hub"
        raise ConfigError(f"--vae {name}: {reason}; expected {expected}") from None

"""Loads published autoencoders, checks them against the parameters, and reads the normalisation of latents in their config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from huggingface_hub.errors import LocalEntryNotFoundError

from dit.autoencoder.files import from_pretrained
from dit.autoencoder.kinds import CLASSES, Autoencoder
from dit.errors import ConfigError, DataError
from dit.sections import PretrainedAutoencoder

WIDTHS = {"AutoencoderKL": "block_out_channels", "AutoencoderTiny": "encoder_block_out_channels"}
"""The entry of config.json that lists the width at each resolution; each resolution has half the side length of the one before.
"""


def load_pretrained(params: PretrainedAutoencoder, image_channels: int = 3) -> Autoencoder:
    """An autoencoder in diffusers format, from a local directory (alone, or as `vae/` of a pipeline) or from the hub.

    Raises `ConfigError` if there is none, or if its shape differs from the shape in `params`, and `ConnectionError` if the hub
    does not answer.
    """
    config = read_config(params, image_channels)
    with _errors_explained(params):
        return from_pretrained(config["_class_name"], params.path, **_place(params))


def read_config(params: PretrainedAutoencoder, image_channels: int = 3) -> dict[str, Any]:
    """Only the config of the autoencoder, checked against `params`. Raises the same errors as `load_pretrained`."""
    directory = Path(params.path)
    on_disk = directory.is_absolute() or params.path.startswith(("./", "../", "~")) or params.path.count("/") > 1
    if on_disk and not directory.is_dir():
        raise ConfigError(f"autoencoder.path = '{params.path}': no such directory")
    with _errors_explained(params):
        config: dict[str, Any] = AutoencoderKL.load_config(params.path, **_place(params))
    _check_shape(params, config, image_channels)
    return config


def _place(params: PretrainedAutoencoder) -> dict[str, Any]:
    """The subfolder and the revision that diffusers should read, as keyword arguments."""
    directory = Path(params.path)
    below = not (directory / "config.json").is_file() and (directory / "vae" / "config.json").is_file()
    return {"revision": params.revision, **({"subfolder": "vae"} if below else {})}


@contextmanager
def _errors_explained(params: PretrainedAutoencoder) -> Iterator[None]:
    """Turn errors of diffusers into `ConnectionError` if the hub did not answer, otherwise into `ConfigError`."""
    try:
        yield
    except OSError as error:
        if _unreachable(error):
            raise ConnectionError(f"autoencoder.path = '{params.path}' is no directory, and the hub did not answer") from None
        raise ConfigError(f"autoencoder.path = '{params.path}', revision '{params.revision}': {error}") from None


def normalization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The normalisation `(z - shift) * scale` in the config of an autoencoder, as diffusers' pipelines compute it; None if the
    config has none.

    `scaling_factor` is from Rombach et al. (2022), appendix G, and `shift_factor` from Esser et al. (2024), "Scaling Rectified
    Flow Transformers". If the config also has `latents_mean` and `latents_std`, the result is `(z - mean) * scaling_factor /
    std`. Returns `shift` and `scale`, each a number per channel, the `factor`, and the `source` in words. Raises `DataError`
    for a combination that no pipeline of diffusers can compute.
    """
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if factor is None:
        return None
    stated = {"scaling_factor": factor, "shift_factor": shift, "latents_mean": mean, "latents_std": std}
    source = ", ".join(f"{key} {_shown(value)}" for key, value in stated.items() if value)
    channels = config["latent_channels"]
    lists = [values for values in (mean, std) if values is not None]
    if len(lists) == 1 or any(len(values) != channels for values in lists) or (lists and shift):
        raise DataError(
            f"the autoencoder's config.json states {source}: expected scaling_factor with shift_factor, "
            f"or latents_mean and latents_std of {channels} channels"
        )
    if mean is None or std is None:
        mean, std = [shift or 0.0] * channels, [1.0] * channels
    scale = [factor / value for value in std]
    source += " of the autoencoder's config.json"
    return {"shift": [float(value) for value in mean], "scale": scale, "factor": factor, "source": source}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else f"[{' '.join(f'{each:g}' for each in value)}]"


def _check_shape(params: PretrainedAutoencoder, found: dict[str, Any], image_channels: int) -> None:
    kind = found.get("_class_name", "unknown")
    if kind not in CLASSES:
        raise ConfigError(f"autoencoder.path = '{params.path}' holds a model of class {kind}: expected {' or '.join(CLASSES)}")
    signature = inspect.signature(CLASSES[kind].__init__).parameters
    config = {name: parameter.default for name, parameter in signature.items()} | found
    for key, value, stated in (
        ("latent_channels", config["latent_channels"], params.latent_channels),
        ("downsample", 2 ** (len(config[WIDTHS[kind]]) - 1), params.downsample),
    ):
        if value != stated:
            raise ConfigError(f"autoencoder.{key} = {stated}, but '{params.path}' has {value}: expected {value}")
    for key in ("in_channels", "out_channels"):
        if config[key] != image_channels:
            raise ConfigError(
                f"autoencoder.path = '{params.path}' has {key} = {config[key]}, but images.channels = {image_channels}: "
                "expected the same"
            )


def _unreachable(error: BaseException | None) -> bool:
    """Whether an error was caused by a hub that did not answer, which the message of diffusers does not say."""
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False

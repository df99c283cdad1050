"""Published autoencoders: loaded, checked against what the parameters state; and the normalisation published with them."""

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
"""The entry of config.json with the width of each resolution; each after the first has half the pixels."""


def load_pretrained(params: PretrainedAutoencoder, image_channels: int = 3) -> Autoencoder:
    """An autoencoder from a local directory in diffusers format, alone or as `vae/` of a pipeline, or from the hub.

    Raises `ConfigError` where there is none or its shape is not the one that `params` states, `ConnectionError` where the hub
    does not answer.
    """
    config = read_config(params, image_channels)
    with _errors_explained(params):
        return from_pretrained(config["_class_name"], params.path, **_place(params))


def read_config(params: PretrainedAutoencoder, image_channels: int = 3) -> dict[str, Any]:
    """The configuration alone, checked against what `params` states. Raises as `load_pretrained` does."""
    directory = Path(params.path)
    on_disk = directory.is_absolute() or params.path.startswith(("./", "../", "~")) or params.path.count("/") > 1
    if on_disk and not directory.is_dir():
        raise ConfigError(f"autoencoder.path = '{params.path}': no such directory")
    with _errors_explained(params):
        config: dict[str, Any] = AutoencoderKL.load_config(params.path, **_place(params))
    _check_shape(params, config, image_channels)
    return config


def _place(params: PretrainedAutoencoder) -> dict[str, Any]:
    """Where below a path, and at which revision, diffusers is to look."""
    directory = Path(params.path)
    below = not (directory / "config.json").is_file() and (directory / "vae" / "config.json").is_file()
    return {"revision": params.revision, **({"subfolder": "vae"} if below else {})}


@contextmanager
def _errors_explained(params: PretrainedAutoencoder) -> Iterator[None]:
    """Errors of diffusers as `ConnectionError` where the hub did not answer, otherwise as `ConfigError`."""
    try:
        yield
    except OSError as error:
        if _unreachable(error):
            raise ConnectionError(f"autoencoder.path = '{params.path}' is no directory, and the hub did not answer") from None
        raise ConfigError(f"autoencoder.path = '{params.path}', revision '{params.revision}': {error}") from None


def normalization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the config of an autoencoder states of `(z - shift) * scale`, as diffusers' pipelines compute it; None for nothing.

    `scaling_factor` and `shift_factor` are those of Rombach et al. (2022), appendix G, and of Esser et al. (2024), "Scaling
    Rectified Flow Transformers"; `latents_mean` and `latents_std`, where they are stated too, give `(z - mean) *
    scaling_factor / std`. Returned are `shift` and `scale`, a number for each channel, the `factor`, and the `source` in words.
    Raises `DataError` for what no pipeline of diffusers can compute.
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
    """Whether an error has its cause in a hub that did not answer: diffusers' message does not say."""
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False

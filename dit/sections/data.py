"""Sections `images`, `autoencoder` and `latents`: from pictures to the latents on which a network trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dit.errors import ConfigError
from dit.sections.types import (
    MOST_PIXELS,
    Backend,
    Count,
    Device,
    FilePath,
    Fraction,
    NonNegativeFloat,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Precision,
    Section,
    Seed,
    Threads,
    Width,
)

Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class PhotosSource(Section):
    """Class-conditional crops of the pictures that scikit-image ships; `dit.data.sources.photos`."""

    kind: Literal["photos"]
    train_per_class: PositiveInt
    validation_per_class: PositiveInt
    validation_region: OpenFraction
    max_zoom: Annotated[float, Field(ge=1, allow_inf_nan=False)]


class FolderSource(Section):
    """Image files as `root/class/*.{jpg,png,webp}`; `dit.data.sources.folder`."""

    kind: Literal["folder"]
    root: FilePath
    validation_root: FilePath | None
    validation_fraction: OpenFraction


class UnlabelledSource(Section):
    """Image files at any depth below `root`, all of one class; `dit.data.sources.folder`."""

    kind: Literal["unlabelled"]
    root: FilePath
    validation_root: FilePath | None
    validation_fraction: OpenFraction


class HuggingFaceSource(Section):
    """A data set of the `datasets` library; `dit.data.sources.huggingface`. Without `label_column`, it has one class."""

    kind: Literal["huggingface"]
    path: str
    config: str | None
    image_column: str
    label_column: str | None
    train_split: str
    validation_split: str | None
    validation_fraction: OpenFraction


class IdxSource(Section):
    """A folder with the four files of MNIST, Fashion-MNIST or KMNIST; `dit.data.sources.idx`."""

    kind: Literal["idx"]
    root: FilePath
    class_names: Annotated[list[Text], Field(min_length=1)] | None


class WebDatasetSource(Section):
    """Tar shards of the `webdataset` library; `dit.data.sources.webdataset`. Without `label_key`, they have one class."""

    kind: Literal["webdataset"]
    shards: Text
    validation_shards: Text | None
    image_key: Text
    label_key: Text | None
    validation_fraction: OpenFraction


class ImagesParams(Section):
    """Stage `images`."""

    size: Annotated[int, Field(ge=8, le=MOST_PIXELS)]
    channels: Literal[1, 3]
    seed: Seed
    workers: Count
    max_rejected: Fraction
    source: Annotated[
        PhotosSource | FolderSource | UnlabelledSource | HuggingFaceSource | IdxSource | WebDatasetSource,
        Field(discriminator="kind"),
    ]


class TrainedAutoencoder(Section):
    """Stage `autoencoder`, trained on the images of the study."""

    kind: Literal["train"]
    latent_channels: Width
    downsample: PositiveInt
    channels: Annotated[list[Width], Field(min_length=1, max_length=16)]
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    kl_weight: NonNegativeFloat
    seed: Seed
    precision: Literal["auto", "fp32", "bf16"]
    threads: Threads
    device: Device

    @model_validator(mode="after")
    def _consistent(self) -> TrainedAutoencoder:
        if self.downsample != 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"downsample = {self.downsample}: expected {2 ** (len(self.channels) - 1)}, "
                f"as channels has {len(self.channels)} entries"
            )
        return self


class PretrainedAutoencoder(Section):
    """Stage `autoencoder`, loaded from a hub id or a local directory in diffusers format."""

    kind: Literal["pretrained"]
    path: str
    revision: str | None
    latent_channels: Width
    downsample: PositiveInt
    threads: Threads
    device: Device


class IdentityAutoencoder(Section):
    """Stage `autoencoder` without an autoencoder: the latents are the pixels themselves."""

    kind: Literal["identity"]
    latent_channels: Literal[1, 3]
    downsample: Literal[1]
    threads: Threads
    device: Device


class ShiftAndScale(Section):
    """Normalisation by `(z - shift) * scale`; shift and scale are one number each, or a list with one number per channel."""

    shift: Number | list[Number]
    scale: PositiveFloat | list[PositiveFloat]

    def factors(self, channels: int) -> tuple[list[float], list[float]]:
        """Shift and scale, each with one number per latent channel. Raises `ConfigError` for lists of another length."""
        return _per_channel("shift", self.shift, channels), _per_channel("scale", self.scale, channels)


class MeanAndStd(Section):
    """Normalisation by `(z - mean) / std`; mean and std are one number each, or a list with one number per channel."""

    mean: Number | list[Number]
    std: PositiveFloat | list[PositiveFloat]

    def factors(self, channels: int) -> tuple[list[float], list[float]]:
        """Shift and scale, each with one number per latent channel. Raises `ConfigError` for lists of another length."""
        return _per_channel("mean", self.mean, channels), [1 / std for std in _per_channel("std", self.std, channels)]


def _per_channel(key: str, values: float | list[float], channels: int) -> list[float]:
    if isinstance(values, float):
        return [values] * channels
    if len(values) != channels:
        raise ConfigError(
            f"latents.normalize.{key} has {len(values)} entries: expected {channels}, one for each latent channel"
        )
    return values


class LatentsParams(Section):
    """Stage `latents`."""

    flip: bool
    normalize: Literal["auto", "published", "per_channel", "global"] | PositiveFloat | ShiftAndScale | MeanAndStd
    dtype: Literal["float32", "float16"]
    batch_size: PositiveInt
    precision: Precision
    backend: Backend
    processes: PositiveInt
    threads: Threads
    device: Device

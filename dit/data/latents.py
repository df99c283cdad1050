"""The latents of all images: posterior mean and standard deviation on disk, and their normalisation to unit variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from dit.data.store import SPLITS, Store, StoreWriter
from dit.distributed import Ranks
from dit.errors import ConfigError, DataError
from dit.progress import progress
from dit.sections.data import LatentsParams, MeanAndStd, ShiftAndScale

if TYPE_CHECKING:
    from dit.data.images import ImageStore

T = TypeVar("T")
Encode = Callable[[np.ndarray], tuple[Tensor, Tensor]]
"""Pixels (B, H, W, C) uint8 -> mean and standard deviation of the posterior, each (B, C, h, w) float32.

It may have two attributes. `published` is the normalisation that is published with the encoder, in the form that
`write_latents` returns and with its `factor`, or None. `spread` is False if all standard deviations are 0; they are then not
stored.
"""
Normalize = Literal["auto", "published", "per_channel", "global"] | float | ShiftAndScale | MeanAndStd
"""The values that `latents.normalize` may have."""


@dataclass(frozen=True)
class Latents:
    """The posteriors of one split, raw (not normalised), as read-only memory maps; `std` may be zeros that take no memory.

    `mean` and `std` are (N, F, C, h, w), float32 or float16; F is 2 if mirrored images are stored too, at index 1. `labels` are
    (N,) int64.
    """

    mean: np.ndarray
    std: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class LatentStore:
    """Reads the output of stage `latents`. Raises `DataError` if the directory holds no complete store."""

    def __init__(self, directory: str | Path = "data/latents") -> None:
        self.store = Store(directory)
        self.class_names: list[str] = self.store.meta["class_names"]
        self.num_classes: int = self.store.meta["num_classes"]
        _, _, self.latent_channels, self.latent_size, _ = self.store.arrays["train_mean"].shape
        normalize = self.store.meta["normalize"]
        self.shift = torch.tensor(normalize["shift"]).view(1, -1, 1, 1)
        self.scale = torch.tensor(normalize["scale"]).view(1, -1, 1, 1)
        self._sent: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that `dit.models.build` needs."""
        return {"latent_size": self.latent_size, "latent_channels": self.latent_channels, "num_classes": self.num_classes}

    def split(self, name: Literal["train", "validation"]) -> Latents:
        """The posteriors of `"train"` or `"validation"`. Raises `DamagedError` if the bytes of a file have changed."""
        mean, labels = (self.store.verified(f"{name}_{part}") for part in ("mean", "labels"))
        if f"{name}_std" not in self.store.arrays:
            return Latents(mean, np.broadcast_to(np.zeros((), mean.dtype), mean.shape), labels)
        return Latents(mean, self.store.verified(f"{name}_std"), labels)

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> normalised latents for the diffusion model: `(z - shift) * scale`, per channel."""
        shift, scale = self._factors(z)
        return (z - shift) * scale

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of `normalize`: normalised latents (B, C, h, w) -> raw latents, which the autoencoder decodes."""
        shift, scale = self._factors(z)
        return z / scale + shift

    def _factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`shift` and `scale` on the device and in the dtype of `z`. They are sent only once, since the host waits for that."""
        if (z.device, z.dtype) not in self._sent:
            self._sent[z.device, z.dtype] = self.shift.to(z), self.scale.to(z)
        return self._sent[z.device, z.dtype]


def write_latents(
    images: ImageStore, encode: Encode, settings: LatentsParams, directory: Path | None, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Encode every image, in order, into a store at `directory`; returns the normalisation of the latents.

    A latent z is normalised to `(z - shift) * scale`. The result has `shift` and `scale`, one value per channel, and `source`,
    which says in words where they come from. Each rank encodes its own `batch_size` rows of every batch; `directory` is None on
    all ranks except the first.

    Raises `ConfigError` if `settings.normalize` does not fit the encoder, and `DataError` for latents that are not finite, or
    that are too large for `latents.dtype`.
    """
    ranks = ranks or Ranks(torch.device("cpu"))
    first, _ = encode(images.train_images[:1])
    item = (2 if settings.flip else 1, *first.shape[1:])
    stated = stated_normalization(settings.normalize, item[1], getattr(encode, "published", None))
    kinds = ("mean", "std") if getattr(encode, "spread", True) else ("mean",)
    arrays = {f"{split}_{kind}": (settings.dtype, item) for split in SPLITS for kind in kinds}
    labels = {f"{split}_labels": (np.int64, ()) for split in SPLITS}
    writer = StoreWriter(directory, **arrays, **labels) if directory else None
    moments = Moments(channels=item[1])
    for split in SPLITS:
        pixels = getattr(images, f"{split}_images")
        if writer:
            writer.append(f"{split}_labels", np.asarray(getattr(images, f"{split}_labels")))
        size = settings.batch_size * ranks.size
        batches = (pixels[start : start + size] for start in range(0, len(pixels), size))
        encoded = (ranks.split(partial(_encode, encode, batch, settings.flip), len(batch)) for batch in batches)
        done = 0
        with progress(len(pixels), f"{split} latents", "image", shown=ranks.is_main) as bar:
            for parts in one_ahead(encoded):
                mean, std = _stored(parts, settings)
                _check_finite(mean, std, split, done)
                for kind, values in zip(kinds, (mean, std), strict=False):
                    if writer:
                        writer.append(f"{split}_{kind}", values)
                if split == "train":
                    moments.add(mean, std)
                done += len(mean)
                bar.update(len(mean))
    normalize = stated or moments.normalization("global" if settings.normalize == "global" else "per_channel")
    if writer:
        writer.close(
            class_names=images.class_names, num_classes=len(images.class_names), flip=settings.flip, normalize=normalize
        )
    return normalize


class Moments:
    """Mean and variance per channel of all training latents, if each latent is drawn from its posterior."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.total = np.zeros(channels)
        self.squares = np.zeros(channels)

    def add(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Add a batch (B, F, C, h, w): `E[z] = E[mean]` and `E[z^2] = E[mean^2 + std^2]`. Sums are in float64."""
        mean, std = mean.astype(np.float64), std.astype(np.float64)
        self.count += mean.size // mean.shape[2]
        self.total += mean.sum(axis=(0, 1, 3, 4))
        self.squares += (mean**2 + std**2).sum(axis=(0, 1, 3, 4))

    def normalization(self, method: Literal["per_channel", "global"]) -> dict[str, Any]:
        """`shift` and `scale`, one value per channel, of `(z - shift) * scale`, and their `source`.

        `per_channel` gives zero mean and unit variance to each channel, `global` to all channels together. Raises `DataError`
        if a channel does not vary.
        """
        channels = len(self.total)
        mean, square = self.total / self.count, self.squares / self.count
        if method == "global":
            mean, square = np.full(channels, mean.mean()), np.full(channels, square.mean())
        variance = square - mean**2
        if (constant := np.flatnonzero(variance <= 0)).size:
            raise DataError(f"latent channels {constant.tolist()} are constant, so no factor gives them unit variance")
        source = f"mean and variance of the training set, {'over all channels' if method == 'global' else 'of each channel'}"
        return {"shift": mean.tolist(), "scale": (variance**-0.5).tolist(), "source": source}


def stated_normalization(normalize: Normalize, channels: int, published: dict[str, Any] | None) -> dict[str, Any] | None:
    """The normalisation that the parameters give or that is `published` with the encoder; None if it has to be measured.

    A number is the scale, without a shift: the fixed factor of Rombach et al. (2022), appendix G, such as 0.18215. If the
    published normalisation also has a shift or factors of single channels, the number must be its factor, and stands for all of
    it. Raises `ConfigError` for 'published' if nothing is published, for a number that must be the published factor and is not,
    and for lists that do not have `channels` entries.
    """
    if normalize in ("auto", "published"):
        if normalize == "published" and not published:
            raise ConfigError("latents.normalize = 'published': the autoencoder's config.json states no scaling_factor")
        return published
    if isinstance(normalize, str):
        return None
    if isinstance(normalize, float):
        return _by_number(normalize, channels, published)
    shift, scale = normalize.factors(channels)
    return {"shift": shift, "scale": scale, "source": "latents.normalize"}


def _by_number(normalize: float, channels: int, published: dict[str, Any] | None) -> dict[str, Any]:
    scaled = {"shift": [0.0] * channels, "scale": [normalize] * channels, "source": "latents.normalize"}
    if not published:
        return scaled
    if math.isclose(normalize, published["factor"], rel_tol=1e-4):
        return published
    if any(published["shift"]) or any(value != published["factor"] for value in published["scale"]):
        raise ConfigError(
            f"latents.normalize = {normalize}, where {published['source']} is published: expected 'published', "
            "or {shift: ..., scale: ...} for others"
        )
    return scaled | {"source": f"latents.normalize, where {published['source']} is published"}


def one_ahead(values: Iterable[T]) -> Iterator[T]:
    """The same values, but the next value is requested before one is used, so that a GPU computes while the host stores."""
    waiting: list[T] = []
    for value in values:
        waiting.append(value)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def _encode(encode: Encode, batch: np.ndarray, flip: bool, own: slice) -> tuple[Tensor, Tensor]:
    """Encode the rows `own` of pixels (B, H, W, C) -> mean and std, each (rows, F, C, h, w)."""
    pixels = batch[own]
    views = [pixels, pixels[:, :, ::-1]] if flip else [pixels]
    means, stds = zip(*(encode(view) for view in views), strict=True)
    return torch.stack(means, dim=1), torch.stack(stds, dim=1)


def _stored(parts: tuple[Tensor, ...], settings: LatentsParams) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std in the dtype in which they are stored."""
    mean, std = (part.cpu().numpy() for part in parts)
    with np.errstate(over="ignore"):
        return mean.astype(settings.dtype), std.astype(settings.dtype)


def _check_finite(mean: np.ndarray, std: np.ndarray, split: str, start: int) -> None:
    finite = (np.isfinite(mean) & np.isfinite(std)).all(axis=(1, 2, 3, 4))
    if not finite.all():
        image = start + int(np.argmin(finite))
        raise DataError(
            f"the latent of {split} image {image} is not finite in {mean.dtype}; check the autoencoder, "
            f"latents.dtype and latents.precision"
        )

"""Statistics of many images: normal distributions of their features, in this project's files and in those of others.

The files of OpenAI's guided-diffusion (`evaluations/evaluator.py`) are `.npz` with mean `mu` and covariance `sigma` of
Inception's pooled features, `mu_s` and `sigma_s` of its spatial features, and `arr_0`, some of the images. No pickle is ever
read.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit.errors import ConfigError, DataError
from dit.evaluation.archives import IMAGES, ArchivedImages
from dit.evaluation.features import FeatureExtractor, Outputs
from dit.evaluation.inception import SPATIAL
from dit.progress import progress
from dit.sections import EvaluateParams

ASYMMETRY = 1e-4
"""The largest asymmetry of a covariance, relative to its largest entry; above it, a matrix is refused."""
KEYS = {"mean": "mu", "covariance": "sigma", "spatial_mean": "mu_s", "spatial_covariance": "sigma_s"}
"""Tensors of a saved reference, and their names in the files of guided-diffusion."""
FEATURES, ABOUT = "features", "about"


@dataclass(frozen=True)
class Normal:
    """A normal distribution of features: mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


class Moments:
    """Accumulates mean and covariance of features that come in batches, in float64, without keeping the features."""

    def __init__(self) -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = self._products = torch.zeros(0)

    def add(self, features: Tensor) -> None:
        """Add features (B, D). Sums are taken after subtracting the mean of the first batch, so that no digits are lost."""
        values = features.double()
        if self._shift is None:
            self._shift = values.mean(0)
            self._sum, self._products = torch.zeros_like(self._shift), values.new_zeros(len(self._shift), len(self._shift))
        values = values - self._shift
        self.count += len(values)
        self._sum += values.sum(0)
        self._products += values.T @ values

    def normal(self) -> Normal:
        """The unbiased estimate, as in numpy.cov. Raises `DataError` for fewer than two images."""
        if self._shift is None or self.count < 2:
            raise DataError(f"{self.count} images have no covariance; expected at least 2")
        mean = self._sum / self.count
        covariance = (self._products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Normal(self._shift + mean, covariance)


@dataclass(frozen=True)
class Statistics:
    """Statistics of a set of images; `count` is None if their file does not say how many images it describes.

    `features` (N, D) belong to single images, all or some of them, and are needed for precision and recall; None if there are
    none. `logits` (N, 1008) belong to generated images, for the Inception score. `extractor` is empty and `size` is 0 if the
    file does not say them.
    """

    name: str
    count: int | None
    pooled: Normal
    spatial: Normal | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    extractor: str = ""
    size: int = 0


class Gathered:
    """Gathers outputs for images that come in batches: moments, and the features and logits of each image."""

    def __init__(self) -> None:
        self._pooled, self._spatial = Moments(), Moments()
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, seen: Outputs) -> None:
        """Add a batch. Raises `DataError` for features that are not finite."""
        if not seen.features.isfinite().all():
            raise DataError(f"the features of an image from {self._pooled.count} on are not finite")
        self._pooled.add(seen.features)
        self._features.append(seen.features)
        if seen.spatial is not None:
            self._spatial.add(seen.spatial)
        if seen.logits is not None:
            self._logits.append(seen.logits)

    def statistics(self, name: str, extractor: FeatureExtractor) -> Statistics:
        """The statistics of all images so far."""
        return Statistics(
            name,
            self._pooled.count,
            self._pooled.normal(),
            self._spatial.normal() if self._spatial.count else None,
            torch.cat(self._features),
            torch.cat(self._logits) if self._logits else None,
            extractor.name,
            extractor.size,
        )


def measure(name: str, batches: Iterator[np.ndarray], count: int, extractor: FeatureExtractor) -> Statistics:
    """The statistics of `count` images, which come in batches (B, H, W, C) uint8; features and logits are kept.

    Raises `DataError` for features that are not finite.
    """
    gathered = Gathered()
    with progress(count, f"measure {name}", "image") as bar:
        for batch in batches:
            gathered.add(extractor.outputs(batch))
            bar.update(len(batch))
    return gathered.statistics(name, extractor)


def save(statistics: Statistics, path: Path, with_features: bool = True) -> None:
    """Write a reference: `.safetensors`, or an `.npz` that guided-diffusion's evaluator reads too. Raises `ConfigError`."""
    if path.exists():
        raise ConfigError(f"{path} is there already; remove it, or give another name")
    tensors = {"mean": statistics.pooled.mean, "covariance": statistics.pooled.covariance}
    if statistics.spatial is not None:
        tensors |= {"spatial_mean": statistics.spatial.mean, "spatial_covariance": statistics.spatial.covariance}
    if with_features and statistics.features is not None:
        tensors[FEATURES] = statistics.features
    about = {key: getattr(statistics, key) for key in ("name", "count", "extractor", "size")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {ABOUT: json.dumps(about)})
    elif path.suffix == ".npz":
        named: dict[str, Any] = {KEYS.get(name, name): tensor.numpy() for name, tensor in tensors.items()}
        np.savez(partial, **named, about=np.array(json.dumps(about)))
    else:
        raise ConfigError(f"{path}: expected a name that ends in .safetensors or .npz")
    partial.replace(path)


def load(path: Path, extractor: FeatureExtractor) -> Statistics:
    """Read a reference that fits the extractor: a file that `save` wrote, or an `.npz` as others publish it.

    Raises `DataError`, which names what is missing, has another dimension, is not finite or is no covariance; and `ConfigError`
    if the file says that another feature network made it.
    """
    tensors, about = _safetensors(path) if path.suffix == ".safetensors" else _npz(path)
    for key, own in (("extractor", extractor.name), ("size", extractor.size)):
        if about.get(key) and about[key] != own:
            raise ConfigError(f"{path} was made with features.{key} = {about[key]}, and not {own}; expected the same")
    names = KEYS if path.suffix == ".npz" else {name: name for name in KEYS}
    pooled = _normal(path, tensors, names["mean"], names["covariance"], extractor.dimension, extractor.name)
    if pooled is None:
        held = ", ".join(sorted(tensors)) or "nothing"
        raise DataError(f"{path} has no {names['mean']} and {names['covariance']}; it holds {held}")
    spatial = _normal(path, tensors, names["spatial_mean"], names["spatial_covariance"], SPATIAL, "spatial Inception")
    features = tensors.get(FEATURES)
    if features is None and IMAGES in tensors:  # features in place of images
        features = tensors[IMAGES]
    if features is not None and (
        features.ndim != 2 or features.shape[1] != extractor.dimension or not features.isfinite().all()
    ):
        raise DataError(
            f"{path}: features of shape {tuple(features.shape)}; expected finite numbers (N, {extractor.dimension}), as "
            f"{extractor.name} has them"
        )
    return Statistics(
        path.name, about.get("count"), pooled, spatial, features, None, about.get("extractor", ""), about.get("size", 0)
    )


def has_statistics(path: Path) -> bool:
    """Whether a file holds statistics, not only images."""
    return path.suffix != ".npz" or not _members(path).isdisjoint(KEYS.values()) or IMAGES not in _members(path)


def of_params(params: EvaluateParams, extractor: FeatureExtractor, batch_size: int) -> Statistics | None:
    """The statistics in `evaluate.reference`, with features of the file's images; None if it is not set. Raises as `load`."""
    if params.reference is None:
        return None
    return with_features_of_images(load(params.reference, extractor), params.reference, extractor, batch_size)


def with_features_of_images(reference: Statistics, path: Path, extractor: FeatureExtractor, batch_size: int) -> Statistics:
    """The reference; if it has no features and its own file has images, with the features of these images."""
    if reference.features is not None or path.suffix != ".npz" or IMAGES not in _members(path):
        return reference
    images = ArchivedImages(path)
    seen = [extractor(batch) for batch in _shown(images, batch_size)]
    return replace(reference, features=torch.cat(seen))


def _shown(images: ArchivedImages, batch_size: int) -> Iterator[np.ndarray]:
    with progress(len(images), f"measure {images.path.name}", "image") as bar:
        for batch in images.batches(batch_size):
            yield batch
            bar.update(len(batch))


def _members(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected reference statistics, .npz or .safetensors") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: no .npz archive ({error})") from None


def _npz(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays with statistics, without images, which may be larger than memory; and the file's description of itself."""
    if path.suffix != ".npz":
        raise DataError(f"{path}: expected reference statistics, .npz or .safetensors")
    members = _members(path)
    wanted = [*KEYS.values(), FEATURES, *([IMAGES] if _are_activations(path, members) else [])]
    try:
        with np.load(path, allow_pickle=False) as file:
            tensors = {name: torch.from_numpy(_floats(path, name, file[name])) for name in wanted if name in members}
            about = json.loads(str(file[ABOUT])) if ABOUT in members else {}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {error}; expected arrays of numbers, without pickles") from None
    return tensors, about if isinstance(about, dict) else {}


def _are_activations(path: Path, members: set[str]) -> bool:
    """Whether `arr_0` holds floats, the features of images, and not images."""
    if IMAGES not in members:
        return False
    with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        _, _, dtype = read(member)
    return dtype.kind == "f"


def _floats(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f":
        raise DataError(f"{path}: {name} is {array.dtype}; expected floating-point numbers")
    return np.ascontiguousarray(array, np.float64 if name in KEYS.values() else np.float32)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            names: list[str] = file.keys()
            return {name: file.get_tensor(name) for name in names}, about
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected reference statistics, .npz or .safetensors") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: no safetensors file: {error}") from None


def _normal(
    path: Path, tensors: Mapping[str, Tensor], mean_name: str, covariance_name: str, dimension: int, network: str
) -> Normal | None:
    """A mean and a covariance that belong together; None where both are missing."""
    if mean_name not in tensors and covariance_name not in tensors:
        return None
    for name, other in ((mean_name, covariance_name), (covariance_name, mean_name)):
        if name not in tensors:
            raise DataError(f"{path} has {other} but no {name}; expected both")
    mean, covariance = tensors[mean_name].double(), tensors[covariance_name].double()
    shapes = f"{mean_name} {tuple(mean.shape)} and {covariance_name} {tuple(covariance.shape)}"
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path}: {shapes} do not go together; expected (D,) and (D, D)")
    if len(mean) != dimension:
        raise DataError(
            f"{path}: {shapes} are of {len(mean)} features, and {network} has {dimension}; expected statistics of the same "
            "network"
        )
    for name, values in ((mean_name, mean), (covariance_name, covariance)):
        if bad := int((~values.isfinite()).sum()):
            raise DataError(f"{path}: {bad:,} of {values.numel():,} entries of {name} are not finite; expected numbers")
    if (covariance - covariance.T).abs().max() > ASYMMETRY * covariance.abs().max() or bool((covariance.diag() < 0).any()):
        raise DataError(f"{path}: {covariance_name} is no covariance; expected a symmetric matrix without negative variances")
    return Normal(mean, covariance)

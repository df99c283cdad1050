"""Inception-v3 as used in the literature: TensorFlow's network of 2015, from torch-fidelity, with three of its outputs."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url

from dit.errors import ConfigError
from dit.sections import FeaturesParams

POOLED = 2048
"""Features of the last pooling layer, `pool_3`: of FID, precision and recall."""
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
SPATIAL = SPATIAL_CHANNELS * SPATIAL_SIDE**2
"""Features for sFID: the first 7 channels of `mixed_6/conv`, 17 x 17 positions; Nash et al. (2021), OpenAI's `evaluator.py`."""
LOGITS = 1008
"""Classes of the network, for the Inception score."""
INSTALL = "features.extractor = 'inception' needs torch-fidelity: pip install -e '.[inception]'"


class Inception(nn.Module):
    """`network` is torchmetrics' `NoTrainInceptionV3` with the outputs 2048 and logits_unbiased."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._spatial: Tensor | None = None
        # TensorFlow's mixed_4 to mixed_7 are Mixed_6b to Mixed_6e, and `conv` is the 1 x 1 branch of each, after its ReLU.
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 -> (B, 2048)."""
        return self.outputs(pixels)[0]

    def outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, 3, H, W) uint8 -> pooled features (B, 2048), spatial features (B, 2023), logits without bias (B, 1008).

        Spatial features are in the order of TensorFlow: rows, columns, channels.
        """
        pooled, logits = self.network._torch_fidelity_forward(pixels)
        assert self._spatial is not None
        spatial, self._spatial = self._spatial, None
        return pooled.flatten(1), spatial.permute(0, 2, 3, 1).flatten(1), logits


def cached_weights() -> Path | None:
    """The weights that torch-fidelity publishes, if this machine has downloaded them; otherwise None.

    Raises `ConfigError` if torch-fidelity is not installed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ModuleNotFoundError:
        raise ConfigError(INSTALL) from None
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    return path if path.is_file() else None


def inception(params: FeaturesParams) -> tuple[nn.Module, int]:
    """Inception-v3 with the weights and the resizing of Heusel et al. (2017), by torch-fidelity.

    Images are resized as in TensorFlow 1, without antialiasing, so that distances can be compared with the literature. Because
    torch-fidelity unpickles anything in its file, the file is first read here in a way that executes nothing. Raises
    `ConfigError` if the package or the weights are missing.
    """
    path = None if params.weights is None else str(params.weights)
    try:
        if path:
            torch.load(path, weights_only=True)
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3

        if not path:
            load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], path, antialias=False)
        return Inception(network), POOLED
    except ModuleNotFoundError:
        raise ConfigError(INSTALL) from None
    except UnpicklingError:
        raise ConfigError(
            f"features.weights = '{path}' holds more than weights; expected those of torch-fidelity, or null"
        ) from None
    except (FileNotFoundError, RuntimeError) as error:
        found = str(error).splitlines()[0]
        raise ConfigError(f"features.weights = '{path}': {found}; expected weights of torch-fidelity, or null") from None

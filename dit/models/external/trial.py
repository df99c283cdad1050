"""Calls an external network once when it is built, so that errors appear here and not in the middle of a study."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor, nn

from dit.errors import ConfigError, UserError
from dit.models.external.blocks import stream_blocks
from dit.models.external.network import External
from dit.seeding import seeded

SAMPLES = 2


def check(network: External, name: str) -> None:
    """Call `network`, also with the null class, and record its blocks. Raises `ConfigError` if the call fails.

    Some operations do not exist on the meta device, so there it reports only wrong shapes and dtypes.
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    if not weights:
        raise ConfigError(f"{name} has no weight to train")
    _check_signature(network, name)
    training = network.training
    try:
        with torch.no_grad(), seeded("trial"):
            network.block_paths = stream_blocks(network.eval(), lambda: _call(network, name, torch.float32))
            if weights[0].is_meta:
                _call(copy.deepcopy(network).double(), name, torch.float64)
    except ConfigError:
        raise
    except Exception as error:  # the network may raise any error
        if not weights[0].is_meta or _about_precision(error):
            raise ConfigError(_explained(error, network, name)) from error
    finally:
        network.train(training)


def _call(network: External, name: str, dtype: torch.dtype) -> Tensor:
    device = next(network.parameters()).device
    size, channels = network.latent_size, network.latent_channels
    x = torch.zeros(SAMPLES, channels, size, size, dtype=dtype, device=device)
    labels = torch.tensor([0, network.num_classes], device=device)
    output = network(x, torch.tensor([0, 1], device=device), labels)
    expected = (SAMPLES, network.out_channels, size, size)
    if tuple(output.shape) != expected:
        doubled = ", twice the latent channels as diffusion.learn_sigma is true" if network.learn_sigma else ""
        raise ConfigError(f"{name} returned shape {tuple(output.shape)}; expected {expected}{doubled}")
    return output


def _check_signature(network: External, name: str) -> None:
    inner: nn.Module = network.__dict__["inner"]
    try:
        inspect.signature(inner.forward).bind(*(() if network.names else range(3)), **dict.fromkeys(network.names or (), 0))
    except TypeError as error:
        signature = inspect.signature(inner.forward)
        raise ConfigError(
            f"{name}: its network is called as (x, t, y), which its forward{signature} does not take: {error}"
        ) from None


def _about_precision(error: Exception) -> bool:
    """Whether a trial call failed because of a dtype.

    If a device, such as meta, lacks an operation, torch raises NotImplementedError, whose message may also mention a dtype.
    """
    return not isinstance(error, UserError | NotImplementedError) and "dtype" in str(error)


def _explained(error: Exception, network: External, name: str) -> str:
    told = f"{name} cannot be called with x {SAMPLES, network.latent_channels, network.latent_size, network.latent_size}, "
    told += f"whole timesteps t and labels y of 0 to {network.num_classes}, the null class: {type(error).__name__}: {error}"
    if isinstance(error, IndexError):
        return f"{told}; an embedding of labels needs num_classes + 1 = {network.num_classes + 1} rows"
    if _about_precision(error):
        return f"{told}; it is also run in float64, so what it computes from t must be in the precision of x"
    return told

"""A trained network with what is needed to sample from it: its parameters, its diffusion, and how latents are normalised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit import config, models
from dit.audit import AuditReport, audit
from dit.audit.targets import of_latents
from dit.devices import resolve_device, resolve_precision
from dit.errors import ConfigError, DataError, InputError, explain
from dit.models import Denoiser
from dit.sampling import Network, sample as draw
from dit.sections import SCHEDULERS, DiffusionParams, EvaluateParams, ModelParams, Section

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class ModelConfig(Section):
    """The content of `config.json`: sections `model` and `diffusion`, sizes, and the shift and scale of each channel."""

    model: ModelParams
    diffusion: DiffusionParams
    sizes: dict[str, int]
    shift: tuple[float, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True)
class Model:
    """A trained network, and what is needed to sample from it.

    `network(x, t, y)` takes normalised latents, `(z - shift) * scale`; see `dit.models.Denoiser`. `config` holds its
    parameters, and the shift and scale of each channel.
    """

    network: Denoiser = field(repr=False)
    config: ModelConfig

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `directory`, and make this directory if it is missing."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(self.config.model_dump(mode="json"), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Model:
        """Read what `save_pretrained` wrote. The network is on the CPU, in eval mode.

        Raises `InputError` if a file is missing, and `DataError` or `ConfigError` if one is damaged or does not fit.
        """
        folder = Path(directory)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise InputError(folder / name, "not found: expected a folder that save_pretrained wrote")
        text = (folder / CONFIG).read_text()
        try:
            found = ModelConfig.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(explain(error, str(folder / CONFIG), {})) from None
        network = models.build(found.model.name, learn_sigma=found.diffusion.learn_sigma, **found.sizes, **found.model.options)
        try:
            network.load_state_dict(load_file(folder / WEIGHTS))
        except Exception as error:  # safetensors and torch name no class of their own for a damaged file
            raise DataError(f"{folder / WEIGHTS} does not hold the weights of {found.model.name}: {error}") from None
        return cls(network.eval(), found)


def sample(
    model: Model,
    labels: Sequence[int] | Tensor,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    scheduler: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
) -> Tensor:
    """Draw one latent for each of `labels` (N,) -> (N, C, H, W) float32, in the units of the latents of training.

    An argument that you leave out has the value in section `evaluate` of the package's `params.yaml`. If the scheduler there
    does not fit the network's objective, the first one that fits is used. If the network was trained without label dropout,
    guidance is off by default. Raises `ConfigError` for a value that does not fit, and `DataError` for a label that is no
    class.
    """
    wanted = torch.as_tensor(labels)
    classes = model.config.sizes["num_classes"]
    if wanted.ndim != 1 or not len(wanted) or wanted.is_floating_point():
        raise DataError(f"labels of shape {tuple(wanted.shape)}: expected a list of classes, such as [0, 1, 2]")
    if int(wanted.min()) < 0 or int(wanted.max()) >= classes:
        raise DataError(f"labels = {wanted.tolist()}: expected classes from 0 to {classes - 1}")
    given = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "scheduler": scheduler,
        "batch_size": batch_size,
        "device": device,
    }
    settings = _sampler(model, {key: value for key, value in given.items() if value is not None})
    where = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, where)
    network = model.network.to(where)
    backend = models.backend_for(network, settings.backend, where, precision, "evaluate")
    latents = draw(
        Network(network, backend),
        model.config.diffusion,
        wanted.long(),
        settings,
        device=where,
        precision=precision,
        description="sample",
    )
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (model.config.shift, model.config.scale))
    return latents / scale + shift


def _sampler(model: Model, given: dict[str, Any]) -> EvaluateParams:
    defaults = config.load(config.shipped())
    fitting = SCHEDULERS[model.config.diffusion.objective]
    values: dict[str, Any] = {f"evaluate.{key}": value for key, value in given.items()}
    if "scheduler" not in given and defaults.evaluate.scheduler not in fitting:
        values["evaluate.scheduler"] = fitting[0]
    if "guidance_scale" not in given and not model.config.model.label_dropout:
        values["evaluate.guidance_scale"] = 1.0
    values["diffusion"] = model.config.diffusion.model_dump(mode="json")
    values["model.label_dropout"] = model.config.model.label_dropout
    return defaults.with_values(values, "dit.sample").evaluate


def audit_model(model: Model | nn.Module, *, steps: int = 4) -> AuditReport:
    """Find out how a network of this project is initialised, from what it does.

    The audit trains a copy for `steps` optimiser steps, and leaves the network as it is. Raises `ConfigError` if `dit.models`
    did not make the network: for such a network call `dit.audit.audit` with a batch of your own.
    """
    network = model.network if isinstance(model, Model) else model
    if not isinstance(network, Denoiser):
        raise ConfigError(
            f"{type(network).__name__} is not a network of dit.models; call dit.audit.audit(model, batch) instead"
        )
    return audit(network, of_latents(network), steps=steps)

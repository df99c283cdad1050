"""Targets of `dit audit`: a network, and a batch to call it with, from a name, a file, a directory or a function."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit import config, init
from dit.audit import directories, published
from dit.audit.building import check_config, made
from dit.audit.files import Reading, fill, read_file
from dit.audit.probe import Batch, LossFunction
from dit.audit.report import Source
from dit.audit.signatures import SIGNATURES
from dit.audit.specs import made as inputs_of
from dit.audit.wrappers import unwrapped
from dit.data.classes import num_classes
from dit.diffusion import Batch as TrainingBatch, Diffusion
from dit.errors import ConfigError, DataError, UserError, did_you_mean
from dit.models import Denoiser, backbone_of
from dit.models.external.sources import diffusers_class, function, working_directory_searched
from dit.seeding import generator

ACCEPTED = (
    "diffusers:ClassName, strategy:name, a checkpoint (.pt, .safetensors), a diffusers directory with config.json and its "
    "weights, or package.module:function"
)
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
PARAMS = Path("params.yaml")
BATCH = 4
SHOWN = 60
"""How many characters of `--config` a message repeats."""


@dataclass(frozen=True)
class AuditTarget:
    """A network, the batch that it is called with, and its own loss if it has one."""

    model: nn.Module
    batch: Batch
    loss: LossFunction | None = None
    source: Source | None = None
    """Where its weights were read."""


def load(
    target: str,
    config: Mapping[str, Any],
    *,
    model_name: str | None = None,
    seed: int = 0,
    params: Path = PARAMS,
    weights: Path | None = None,
    reading: Reading | None = None,
) -> AuditTarget:
    """The network that `target` names; `config` holds arguments of its constructor, or what a checkpoint does not tell.

    A strategy comes from the parameter file `params`; its network is `model_name`, by default the one in that file. `weights`
    is a file or directory with weights for the network that a function returns; `reading` says how files are read.

    Raises `ConfigError` or `DataError` if there is no such network, or if its files cannot be used safely.
    """
    reading = reading or Reading()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind, _, name = target.partition(":")
        path = Path(target)
        of_function = bool(name) and kind not in ("diffusers", "strategy") and not path.exists() and path.suffix not in SUFFIXES
        if weights is not None and not of_function:
            raise ConfigError(f"--weights is for package.module:function, and the target is '{target}'; leave it out")
        if kind == "diffusers":
            return _diffusers(name, config)
        if kind == "strategy":
            return _strategy(name, model_name, seed, params)
        if path.is_dir():
            return _directory(path, config, reading)
        if path.suffix in SUFFIXES:
            return _checkpoint(path, config, reading)
        if of_function:
            return _function(kind, name, weights, reading)
    raise ConfigError(f"cannot audit '{target}'; expected one of {ACCEPTED}")


def read_config(text: str) -> dict[str, Any]:
    """A mapping from `text`, which is JSON or the path of a JSON file. Raises `ConfigError` for anything else."""
    with contextlib.suppress(OSError, ValueError):
        if Path(text).is_file():
            return directories.read_json(Path(text))
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return directories.parse_json(text, f"--config = {shown}")


def _diffusers(name: str, config: Mapping[str, Any]) -> AuditTarget:
    """A transformer of diffusers, built by its constructor; arguments that `config` does not give are small."""
    from dit.audit import synthesis

    check_config(name, config)  # before diffusers is imported, which takes seconds
    try:
        constructor = diffusers_class(name)
    except ConfigError as error:
        import diffusers

        raise ConfigError(f"{error}{did_you_mean(name, diffusers.__all__)}") from None
    if constructor.__name__ in SIGNATURES and not config:
        signature = SIGNATURES[constructor.__name__]
        given = {argument: inputs_of(spec) for argument, spec in signature.inputs.items()}
        return AuditTarget(made(constructor, signature.config), given)
    arguments = synthesis.small_config(constructor, config)
    network = made(constructor, arguments)
    return AuditTarget(network, synthesis.inputs(network, arguments))


def _strategy(name: str, model_name: str | None, seed: int, params: Path) -> AuditTarget:
    """The network of a parameter file, or the one called `model_name`, initialised by the strategy `name` of that file.

    Inputs and loss are as in training with the file's objective; see `dit.diffusion.Diffusion.training_loss`.
    """
    loaded = config.load(params)
    if name not in loaded.strategies:
        raise ConfigError(
            f"{params}: unknown strategy '{name}'; expected one of {', '.join(loaded.strategies)}"
            f"{did_you_mean(name, loaded.strategies)}"
        )
    network = init.apply(loaded.network({"num_classes": num_classes(loaded.images)}, model_name), loaded.strategies[name], seed)
    x0, timesteps, labels = of_latents(network)
    objective = loaded.diffusion.objective if loaded.diffusion.objective in backbone_of(network).objectives else "flow"
    settings = {"objective": objective, "learn_sigma": network.learn_sigma}
    diffusion = Diffusion(loaded.diffusion.model_copy(update=settings))
    eps = torch.randn(x0.shape, generator=generator("audit", "noise"))
    batch = TrainingBatch(x0, eps, timesteps, labels)

    def loss(output: Any, _batch: Batch) -> Tensor:
        return diffusion.training_loss(lambda _x, _t, _y: output, batch).total.mean()

    return AuditTarget(network, (diffusion.add_noise(x0, eps, timesteps), timesteps, labels), loss)


def of_latents(network: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
    """A batch for a network of `dit.models`: latents (4, C, H, W) of noise, timesteps (4,) and labels (4,)."""
    draws = generator("audit", "batch")
    x = torch.randn(BATCH, network.latent_channels, network.latent_size, network.latent_size, generator=draws)
    labels = torch.randint(network.num_classes, (BATCH,), generator=draws)
    if network.num_classes > 1 and labels.unique().numel() == 1:
        labels[0] = (labels[0] + 1) % network.num_classes
    return x, torch.tensor([50, 350, 650, 950]), labels


def _checkpoint(path: Path, config: Mapping[str, Any], reading: Reading) -> AuditTarget:
    """A file with the layout of a published DiT, SiT, REPA or LightningDiT."""
    network, weights = published.load(path, config, reading)
    source = fill(network, weights)
    return AuditTarget(network, of_latents(network), source=source)


def _directory(path: Path, config: Mapping[str, Any], reading: Reading) -> AuditTarget:
    """A directory that `save_pretrained` of diffusers wrote; class and weights are those that `from_pretrained` would take."""
    from dit.audit import synthesis

    folder = directories.network_folder(path)
    if not (folder / "config.json").is_file():
        raise DataError(f"{path} holds no config.json; expected a directory that diffusers' save_pretrained wrote")
    saved = {**directories.read_json(folder / "config.json"), **config}
    constructor, arguments, ignored = directories.constructor_of(saved, folder / "config.json")
    check_config(constructor.__name__, arguments)
    network = made(constructor, arguments)
    weights = directories.read_directory(folder, reading, tuple(network.state_dict()))
    source = fill(network, weights).model_copy(update={"ignored_settings": ignored})
    defaults = {name: item.default for name, item in inspect.signature(constructor).parameters.items()}
    return AuditTarget(network, synthesis.inputs(network, {**defaults, **arguments}), source=source)


def _function(module: str, name: str, weights: Path | None, reading: Reading) -> AuditTarget:
    """The (model, batch) or (model, batch, loss) that a user's function returns. The working directory is searched too.

    If `weights` is given, the model gets the weights from this file or directory.
    """
    where = f"{module}:{name}"
    try:
        with working_directory_searched():
            found = function(module, name)
            if _needs_arguments(found):
                raise ConfigError(f"'{where}' needs arguments; expected a function that needs none")
            returned = found()
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"'{where}' raised {type(error).__name__}: {error}") from error
    if not isinstance(returned, tuple) or len(returned) not in (2, 3) or not isinstance(returned[0], nn.Module):
        raise ConfigError(f"'{where}' returned {type(returned).__name__}; expected (model, batch) or (model, batch, loss)")
    if weights is None:
        return AuditTarget(*returned)
    network = unwrapped(returned[0])
    anchors = tuple(network.state_dict())
    read = directories.read_directory if weights.is_dir() else read_file
    source = fill(network, read(weights, reading=reading, anchors=anchors))
    return replace(AuditTarget(*returned), model=network, source=source)


def _needs_arguments(function: Callable[..., Any]) -> bool:
    required = (item for item in inspect.signature(function).parameters.values() if item.default is item.empty)
    return any(item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD) for item in required)

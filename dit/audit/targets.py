"""What `dit audit` is pointed at: a network, and a batch to call it with, from a name, a file, a directory or a function."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit import config, init
from dit.audit.measure import Batch, LossFunction
from dit.diffusion import Batch as TrainingBatch
from dit.diffusion import Diffusion
from dit.errors import ConfigError, DataError, UserError
from dit.init import weights as files
from dit.models import Denoiser, backbone_of
from dit.models.dit.network import DiT
from dit.models.external.sources import built, diffusers_class, function, working_directory_searched
from dit.models.sizes import SIZES
from dit.seeding import generator

ACCEPTED = (
    "diffusers:ClassName, strategy:name, a checkpoint (.pt, .safetensors), a diffusers directory with config.json and "
    "*.safetensors, or package.module:function"
)
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
PARAMS = Path("params.yaml")
BATCH = 4
CLASSES = 10


@dataclass(frozen=True)
class AuditTarget:
    """A network, what it is called with, and its loss where there is one of its own."""

    model: nn.Module
    batch: Batch
    loss: LossFunction | None = None


def load(
    target: str, config: Mapping[str, Any], *, model_name: str | None = None, seed: int = 0, params: Path = PARAMS
) -> AuditTarget:
    """The network that `target` names; `config` are its constructor's arguments, or what a checkpoint does not tell.

    A strategy is one of the file `params`, and its network `model_name`, or that file's own.

    Raises `ConfigError` or `DataError` where there is no such network, or where what it holds cannot be used safely.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind, _, name = target.partition(":")
        if kind == "diffusers":
            return _diffusers(name, config)
        if kind == "strategy":
            return _strategy(name, model_name, seed, params)
        path = Path(target)
        if path.is_dir():
            return _directory(path, config)
        if path.suffix in SUFFIXES:
            return _checkpoint(path, config)
        if name and not path.exists():
            return _function(kind, name)
    raise ConfigError(f"'{target}' is nothing that can be audited; accepted: {ACCEPTED}")


def read_config(text: str) -> dict[str, Any]:
    """A mapping from JSON, or from the JSON file at that path. Raises `ConfigError`."""
    source = text
    with contextlib.suppress(OSError, ValueError):
        if Path(text).is_file():
            source = Path(text).read_text()
    try:
        config = json.loads(source)
    except ValueError as error:
        raise ConfigError(f"--config = {text}: not a file, and not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--config = {text}: {type(config).__name__}; accepted: a JSON object of constructor arguments")
    return config


def _diffusers(name: str, config: Mapping[str, Any]) -> AuditTarget:
    """A transformer of diffusers, built by its constructor: small where `config` does not say otherwise."""
    from dit.audit import synthesis

    constructor = diffusers_class(name)
    arguments = synthesis.small_config(constructor, config)
    network = built(constructor, arguments, "--config")
    return AuditTarget(network, synthesis.inputs(network, arguments))


def _strategy(name: str, model_name: str | None, seed: int, params: Path) -> AuditTarget:
    """The network of a parameter file, or the one called `model_name`, with one of that file's strategies.

    It is asked and charged as in training, by the file's objective: `dit.diffusion.Diffusion.training_loss`.
    """
    loaded = config.load(params)
    if name not in loaded.strategies:
        raise ConfigError(f"{params}: unknown strategy '{name}'; accepted: {', '.join(loaded.strategies)}")
    network = init.apply(loaded.network({"num_classes": CLASSES}, model_name), loaded.strategies[name], seed)
    x0, timesteps, labels = _latent_batch(network)
    objective = loaded.diffusion.objective if loaded.diffusion.objective in backbone_of(network).objectives else "flow"
    settings = {"objective": objective, "learn_sigma": network.learn_sigma}
    diffusion = Diffusion(loaded.diffusion.model_copy(update=settings))
    eps = torch.randn(x0.shape, generator=generator("audit", "noise"))
    batch = TrainingBatch(x0, eps, timesteps, labels)

    def loss(output: Any, _batch: Batch) -> Tensor:
        return diffusion.training_loss(lambda _x, _t, _y: output, batch).total.mean()

    return AuditTarget(network, (diffusion.add_noise(x0, eps, timesteps), timesteps, labels), loss)


def _latent_batch(network: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (4, C, H, W), timesteps (4,) and labels (4,)."""
    draws = generator("audit", "batch")
    x = torch.randn(BATCH, network.latent_channels, network.latent_size, network.latent_size, generator=draws)
    labels = torch.randint(network.num_classes, (BATCH,), generator=draws)
    if network.num_classes > 1 and labels.unique().numel() == 1:
        labels[0] = (labels[0] + 1) % network.num_classes
    return x, torch.tensor([50, 350, 650, 950]), labels


def _checkpoint(path: Path, config: Mapping[str, Any]) -> AuditTarget:
    """A file with the published DiT's layout. Its sizes follow from its shapes, and heads from the published sizes."""
    weights = read_weights(path)
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        tokens = weights["pos_embed"].shape[1]
        classes = weights["y_embedder.embedding_table.weight"].shape[0] - 1
        out_channels = weights["final_layer.linear.weight"].shape[0] // patch**2
    except (KeyError, ValueError, IndexError) as error:
        names = ", ".join(list(weights)[:3])
        raise DataError(
            f"{path} has not the layout of a published DiT ({error} is missing; it holds {names}, ...); "
            "write a function that returns (model, batch) and audit it as package.module:function"
        ) from None
    heads = _heads(path, depth, width, config)
    network = DiT(
        latent_size=round(tokens**0.5) * patch,
        patch_size=patch,
        latent_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        num_classes=classes,
        learn_sigma=out_channels == 2 * channels,
    )
    _fill(network, weights, path)
    return AuditTarget(network, _latent_batch(network))


def _heads(path: Path, depth: int, width: int, config: Mapping[str, Any]) -> int:
    """The number that `config` gives, or that of the published size."""
    if unknown := config.keys() - {"num_heads"}:
        raise ConfigError(f"--config of a checkpoint has {', '.join(sorted(unknown))}; accepted: num_heads")
    if "num_heads" in config:
        given = config["num_heads"]
        if not isinstance(given, int) or given < 1 or width % given:
            raise ConfigError(f"--config: num_heads = {given!r}; accepted: a divisor of the width, {width}")
        return given
    for size in SIZES.values():
        if (size.depth, size.hidden_size) == (depth, width):
            return size.num_heads
    raise ConfigError(
        f"{path}: a DiT of {depth} blocks and width {width} is none of {', '.join(SIZES)}, and a checkpoint does not "
        """tell the number of heads; give it with --config '{"num_heads": 6}'"""
    )


def _fill(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise DataError(f"{path} does not fit {type(network).__name__}: {' '.join(str(error).split())[:500]}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a checkpoint, without executing anything that it holds. Raises `ConfigError` or `DataError`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return _without_prefix(files.read(path))


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as they were before a network was wrapped for distributed training or compiled."""
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return dict(weights)


def _directory(path: Path, config: Mapping[str, Any]) -> AuditTarget:
    """A directory written by diffusers' `save_pretrained`: its class by name, its weights from safetensors alone."""
    from dit.audit import synthesis

    if (path / "transformer").is_dir():  # of a whole pipeline
        path = path / "transformer"
    if not (path / "config.json").is_file():
        raise DataError(f"{path} holds no config.json; accepted: a directory of diffusers with config.json and *.safetensors")
    saved = {**read_config(str(path / "config.json")), **config}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise DataError(f"{path} holds no *.safetensors; other formats are not read from a directory")
    arguments = synthesis.small_config(constructor := diffusers_class(str(saved.get("_class_name", ""))), saved)
    network = built(constructor, arguments, "--config")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_weights(file)
    _fill(network, weights, path)
    return AuditTarget(network, synthesis.inputs(network, arguments))


def _function(module: str, name: str) -> AuditTarget:
    """What somebody's function returns: (model, batch) or (model, batch, loss). The working directory is searched too."""
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
        raise ConfigError(f"'{where}' returned {type(returned).__name__}; accepted: (model, batch) or (model, batch, loss)")
    return AuditTarget(*returned)


def _needs_arguments(function: Callable[..., Any]) -> bool:
    required = (item for item in inspect.signature(function).parameters.values() if item.default is item.empty)
    return any(item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD) for item in required)

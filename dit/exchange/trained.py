"""Load a trained network with all that sampling needs: from a run of a study, a kept checkpoint, a file, or a directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from dit import checksums, models, yamlfile
from dit.audit import published
from dit.audit.directories import read_directory, read_json
from dit.audit.files import Reading, fill
from dit.continuation.request import find as find_kept
from dit.data.latents import LatentStore
from dit.errors import NAMED, ConfigError, DataError, InputError, explain
from dit.exchange import autoencoders
from dit.exchange.names import from_diffusers
from dit.models import Denoiser
from dit.models.contract import FLOW_ONLY
from dit.models.lightning_dit import LIGHTNING_SIZES, PATCH_SIZES as LIGHTNING_PATCH_SIZES
from dit.models.sizes import SIZES, parse_name
from dit.sections import DiffusionParams, ModelParams
from dit.training.kept import digest

if TYPE_CHECKING:
    from dit.autoencoder import Autoencoder

RUNS, LATENTS, AUTOENCODER = Path("runs/train"), "data/latents", "data/autoencoder"
OWN = "dit.json"
"""The file beside exported weights that describes the network in this project's terms."""
WEIGHTS = "model.safetensors"
TIMESTEP_LAYER = "timestep_layer.safetensors"
"""The first layer of the timestep MLP as it was trained, if the export has a fitted one; see `dit.exchange.times`."""
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
FAMILIES = ("DiT", "SiT", "LightningDiT")
PUBLISHED_DIFFUSION = {
    "objective": "eps",
    "learn_sigma": True,
    "num_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "timestep_sampling": "uniform",
    "logit_normal_mean": 0.0,
    "logit_normal_std": 1.0,
}
"""The diffusion of the published DiTs: facebookresearch/DiT `create_diffusion`. SiT and LightningDiT learn a flow instead."""


@dataclass(frozen=True)
class Trained:
    """A network in eval mode on the CPU, its diffusion, and how its latents are decoded to pixels.

    A raw latent z is normalised to `(z - shift) * scale`, per channel. `about` holds facts for the model card, by topic.
    """

    name: str
    network: Denoiser
    model: ModelParams
    diffusion: DiffusionParams
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    class_names: tuple[str, ...]
    autoencoder: Autoencoder | None = None
    """None if no autoencoder is known: then latents can be drawn, but no images."""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the latents that `dit.models.build` needs."""
        network = self.network
        return {
            "latent_size": network.latent_size,
            "latent_channels": network.latent_channels,
            "num_classes": network.num_classes,
        }

    def denormalize(self, z: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) -> raw latents, which the autoencoder decodes."""
        shift, scale = (torch.tensor(values, device=z.device).view(1, -1, 1, 1) for values in (self.shift, self.scale))
        return z / scale + shift


@dataclass(frozen=True)
class Where:
    """Options that say what a target does not; for None, the value is found from the target."""

    model: str | None = None
    vae: str | None = None
    autoencoder: Path | None = None
    latents: Path | None = None
    step: int | None = None
    scratch: Path = Path(".scratch")
    reading: Reading = field(default_factory=Reading)

    @classmethod
    def of(
        cls,
        model: str | None,
        vae: str | None,
        key: str,
        step: int | None,
        latents: Path | None,
        autoencoder: Path | None,
        scratch: Path,
    ) -> Where:
        """Make it from the options of a command."""
        return cls(model, vae, autoencoder, latents, step, scratch, Reading(key=key))


def load(target: str, where: Where) -> Trained:
    """The network that `target` names: a run of the study in the working directory, a file, or a directory.

    A run is given by its name, such as `adaln_zero-0`, or by its folder. With a `step`, or for the folder of a kept checkpoint,
    the weights are the averaged weights of that step. Raises `UserError`, which says what is missing or does not fit.
    """
    path = Path(target)
    if path.suffix in SUFFIXES or path.is_file():
        return of_file(path, where)
    if (path / OWN).is_file() or (path / "model_index.json").is_file() or (path / "config.json").is_file():
        return of_directory(path, where)
    for folder in (path, RUNS / target):
        if (folder / "ema.safetensors").is_file() and where.step is None:
            return of_run(folder, where)
    try:
        return of_checkpoint(target, where)
    except ConfigError as error:
        if where.step is not None:
            raise
        raise ConfigError(
            f"'{target}' is no run in {RUNS}, {_there(target)}, no checkpoint file ({', '.join(SUFFIXES)}) "
            f"and no exported directory; {error}"
        ) from None


def _there(target: str) -> str:
    """The runs of the study in the working directory, for somebody who named one that is none of them."""
    names = sorted(folder.name for folder in RUNS.glob("*") if folder.is_dir())
    if near := get_close_matches(target, names, n=1):
        return f"which has {near[0]}"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"which has {', '.join(names[:NAMED])}{more}" if names else "where no run has ended yet"


def is_images(path: Path) -> bool:
    """Whether `path` holds images, not a network: it is an `.npz`, or a folder without any file that `load` reads."""
    if path.suffix == ".npz":
        return True
    marks = (OWN, "model_index.json", "config.json", "run.json", "ema.safetensors")
    return path.is_dir() and not any((path / mark).is_file() for mark in marks)


def of_run(folder: Path, where: Where) -> Trained:
    """The averaged weights of a run of a study, with the study's latents and autoencoder."""
    checksums.verify(folder)
    record = read_json(folder / "run.json")
    try:
        settings = record["settings"]
        model = ModelParams.model_validate(settings["model"])
        diffusion = DiffusionParams.model_validate(settings["diffusion"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'run.json'} has no {error}; expected what a training run writes") from None
    except ValidationError as error:
        raise ConfigError(explain(error, str(folder / "run.json"), record)) from None
    weights = load_file(folder / "ema.safetensors")
    folders = _folders(folder.name, where)
    return _of_study(folder.name, model, diffusion, weights, folders, where.vae, _about_run(folder, record))


def of_checkpoint(target: str, where: Where) -> Trained:
    """The averaged weights of a kept checkpoint; see `dit.training.kept`."""
    kept = find_kept(target, where.scratch, where.step)
    settings = kept.run.settings
    state = kept.load()
    about = {"steps": kept.step, "seed": settings.seed, "checkpoint": f"step {kept.step}"}
    if where.latents is None and Path(kept.run.latents).is_dir():
        where = Where(**{**vars(where), "latents": Path(kept.run.latents)})
    latents, autoencoder = _folders(settings.name, where)
    if digest(LatentStore(latents)) != kept.run.latents_digest:
        raise InputError(latents, f"does not hold the latents that {kept.path} was trained on; expected --latents with them")
    name = f"{settings.name}-step-{kept.step}"
    return _of_study(name, settings.model, settings.diffusion, state["ema"], (latents, autoencoder), where.vae, about)


def _of_study(
    name: str,
    model: ModelParams,
    diffusion: DiffusionParams,
    weights: Mapping[str, Tensor],
    folders: tuple[Path, Path],
    vae: str | None,
    about: Mapping[str, Any],
) -> Trained:
    """A network whose latents and autoencoder are in `folders`; `vae` names another autoencoder."""
    latents, autoencoder = folders
    store = LatentStore(latents)
    network = models.build(model.name, learn_sigma=diffusion.learn_sigma, **store.sizes, **model.options)
    try:
        network.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise InputError(latents, f"has latents of {store.sizes}, which do not fit the weights of {name}: {error}") from None
    return Trained(
        name,
        network.eval(),
        model,
        diffusion,
        tuple(store.shift.flatten().tolist()),
        tuple(store.scale.flatten().tolist()),
        tuple(store.class_names),
        autoencoders.of_study(autoencoder, vae),
        about,
    )


def _folders(name: str, where: Where) -> tuple[Path, Path]:
    """The folders of a run's latents and autoencoder: as given, or as in `design.yaml`, or else the usual ones."""
    latents, autoencoder = LATENTS, AUTOENCODER
    stages = yamlfile.read("design.yaml")["design"] if Path("design.yaml").is_file() else {}
    latents = str(where.latents or stages.get("train", {}).get(name, {}).get("latents", latents))
    for item in stages.get("latents", {}).values():
        if item.get("out") == latents:
            autoencoder = item.get("autoencoder", autoencoder)
    return Path(latents), where.autoencoder or Path(autoencoder)


def of_file(path: Path, where: Where) -> Trained:
    """A checkpoint in the layout of the published DiT, SiT or LightningDiT, with the autoencoder that `where.vae` names.

    Only `where.model` tells a SiT from a DiT.
    """
    family = _family(where.model)
    network, weights = published.load(path, {}, where.reading, family)
    source = fill(network, weights)
    model = _named(network, where.model, path)
    autoencoder, shift, scale = autoencoders.published(where.vae, network.latent_channels)
    about = {"source": str(path), "holder": source.holder}
    names = tuple(str(label) for label in range(network.num_classes))
    return Trained(path.stem, network.eval(), model, _diffusion(network), shift, scale, names, autoencoder, about)


def _family(name: str | None) -> Any:
    if name is None:
        return None
    family = name.partition("-")[0]
    if family not in FAMILIES:
        raise ConfigError(
            f"--model {name}: a checkpoint file is read as {', '.join(FAMILIES)}; expected a name such as DiT-XL/2"
        )
    return family


def _named(network: Denoiser, name: str | None, path: Path) -> ModelParams:
    """The name and options of the network; raises `ConfigError` if `name` does not fit its sizes."""
    kind = type(network).__name__
    sizes, patches = (LIGHTNING_SIZES, LIGHTNING_PATCH_SIZES) if kind == "LightningDiT" else (SIZES, (2, 4, 8))
    found: Any = network
    for size_name, size in sizes.items():
        if (size.depth, size.hidden_size) == (found.depth, found.hidden_size):
            own = f"{kind}-{size_name}/{found.patch_size}"
            break
    else:
        own = f"{kind}-S/{found.patch_size}"
    if name is not None:
        size, patch = parse_name(name, kind, patches, sizes)
        if (size.depth, size.hidden_size, patch) != (found.depth, found.hidden_size, found.patch_size):
            raise ConfigError(
                f"--model {name}: {path} holds {found.depth} blocks of width {found.hidden_size} and patch size "
                f"{found.patch_size}; leave --model out, or give {own}"
            )
    options: dict[str, Any] = {"depth": found.depth, "hidden_size": found.hidden_size, "num_heads": found.num_heads}
    if kind == "SiT":
        options["sigma_head"] = found.sigma_head
    if kind == "LightningDiT":
        options |= vars(found.variant)
    return ModelParams(name=own, label_dropout=0.1, **options)


def _diffusion(network: Denoiser) -> DiffusionParams:
    """The diffusion of the published networks of this class."""
    flow = models.backbone_of(network).objectives == FLOW_ONLY
    objective = {"objective": "flow", "learn_sigma": False} if flow else {"learn_sigma": network.learn_sigma}
    return DiffusionParams.model_validate({**PUBLISHED_DIFFUSION, **objective})


def of_directory(path: Path, where: Where) -> Trained:
    """A directory that `dit export` wrote, or another one with a `DiTTransformer2DModel`, alone or in a pipeline."""
    own = read_json(path / OWN) if (path / OWN).is_file() else None
    if own is not None and (path / WEIGHTS).is_file():
        weights = load_file(path / WEIGHTS)
        return _of_own(path, own, weights, where)
    transformer = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    config = read_json(transformer / "config.json")
    kind, norm = config.get("_class_name"), config.get("norm_type", "ada_norm_zero")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel") or norm != "ada_norm_zero":
        raise ConfigError(
            f"{transformer / 'config.json'} is of a {kind}; expected a DiTTransformer2DModel, or a directory that `dit export` "
            "wrote"
        )
    side = config.get("sample_size", 32) // config.get("patch_size", 2)
    weights = from_diffusers(read_directory(transformer, where.reading).tensors, side)
    if (path / TIMESTEP_LAYER).is_file():
        weights |= load_file(path / TIMESTEP_LAYER)
    if own is not None:
        classes = own["sizes"]["num_classes"]
        table = weights["y_embedder.embedding_table.weight"]
        weights["y_embedder.embedding_table.weight"] = torch.cat([table[:classes], table[-1:]])  # see dit.exchange.pipeline
        return _of_own(path, own, weights, where)
    return _of_foreign(path, config, weights, where)


def _of_own(path: Path, own: Mapping[str, Any], weights: Mapping[str, Tensor], where: Where) -> Trained:
    try:
        model, diffusion = ModelParams.model_validate(own["model"]), DiffusionParams.model_validate(own["diffusion"])
        sizes, normalize, names = own["sizes"], own["normalize"], own["class_names"]
        network = models.build(model.name, learn_sigma=diffusion.learn_sigma, **sizes, **model.options)
        network.load_state_dict(dict(weights))
    except ValidationError as error:
        raise ConfigError(explain(error, str(path / OWN), own)) from None
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: {OWN} and the weights do not fit: {error}; expected what `dit export` wrote") from None
    autoencoder = autoencoders.exported(path, own, where.vae)
    shift, scale = tuple(normalize["shift"]), tuple(normalize["scale"])
    return Trained(own["name"], network.eval(), model, diffusion, shift, scale, tuple(names), autoencoder, own.get("about", {}))


def _of_foreign(path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], where: Where) -> Trained:
    """A DiT that others published in diffusers format, such as facebook/DiT-XL-2-256."""
    channels = config.get("in_channels", 4)
    network = models.build(
        f"DiT-S/{config.get('patch_size', 2)}",
        latent_size=config.get("sample_size", 32),
        latent_channels=channels,
        num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1,
        learn_sigma=config.get("out_channels") == 2 * channels,
        depth=config.get("num_layers", 28),
        num_heads=config.get("num_attention_heads", 16),
        hidden_size=len(weights["x_embedder.proj.weight"]),
    )
    network.load_state_dict(dict(weights))
    vae = where.vae or (str(path / "vae") if (path / "vae").is_dir() else None)
    autoencoder, shift, scale = autoencoders.published(vae, channels)
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    labels = index.get("id2label") or {}
    names = tuple(str(labels.get(str(label), label)) for label in range(network.num_classes))
    model = _named(network, None, path)
    return Trained(
        path.name, network.eval(), model, _diffusion(network), shift, scale, names, autoencoder, {"source": str(path)}
    )


def _about_run(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about a run and its evaluation, for the model card."""
    final = record.get("final") or {}
    about = {
        "strategy": record.get("strategy"),
        "seed": record.get("seed"),
        "status": record.get("status"),
        "steps": record.get("steps_done"),
        "rules": record["settings"].get("rules"),
        "train": record["settings"].get("train"),
        "validation_error": final.get("ema_validation_mse"),
    }
    evaluated = folder.parents[1] / "evaluate" / folder.name / "metrics.json"
    if evaluated.is_file():
        try:
            about["evaluation"] = json.loads(evaluated.read_text())
        except ValueError as error:
            raise DataError(f"{evaluated}: not valid JSON: {error}") from None
    return about

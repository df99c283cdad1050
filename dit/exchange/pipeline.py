"""Export a trained network as a directory: a `DiTPipeline` of diffusers, or safetensors with a description in `dit.json`."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler
from safetensors.torch import save_file
from torch import Tensor

from dit.autoencoder import Pixels
from dit.errors import ConfigError
from dit.exchange.card import Facts, card
from dit.exchange.names import to_diffusers
from dit.exchange.times import LARGEST_ERROR, fit
from dit.exchange.trained import OWN, TIMESTEP_LAYER, WEIGHTS, Trained
from dit.models.dit.network import DiT
from dit.sampling import noise_schedule
from dit.sections import EvaluateParams
from dit.timesteps import sampled_timesteps

NULL_CLASS = 1000
"""The label for "no class", which is fixed in the code of `DiTPipeline.__call__`."""
PIPELINE_STEPS = 50
"""The default of `num_inference_steps` in `DiTPipeline.__call__`."""
INSTEAD = "export it with --format safetensors, which keeps the weights with their configuration; `dit sample` reads that too"
TIME_IN, TIME_BIAS = "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias"


@dataclass(frozen=True)
class Exported:
    """An exported network: `timesteps` at which the pipeline computes the same as the network, or None for all timesteps."""

    directory: Path
    timesteps: tuple[int, ...] | None
    steps: tuple[int, ...]
    """The numbers of sampling steps that visit only these timesteps."""


def export_pipeline(trained: Trained, directory: Path, settings: EvaluateParams, any_steps: bool = False) -> Exported:
    """Write a directory for `DiTPipeline.from_pretrained`; with scheduler and steps of `settings` it draws the same samples.

    With `any_steps` all tensors are as trained, and the user must add the lines of README.md that correct the pipeline's
    embedding of timesteps. Raises `ConfigError` for what diffusers cannot express.
    """
    network = trained.network
    _check_expressible(trained)
    assert isinstance(network, DiT)
    scheduler = _scheduler(trained, settings)
    weights = {name: tensor.detach().float().cpu() for name, tensor in network.state_dict().items()}
    given = dict(weights)
    timesteps: tuple[int, ...] | None = None
    steps: tuple[int, ...] = (settings.steps,)
    fitted = None
    if not any_steps:
        timesteps, steps, fitted = _fitted(weights, scheduler, settings.steps)
        given |= fitted
    given["y_embedder.embedding_table.weight"] = _padded(weights["y_embedder.embedding_table.weight"])
    transformer = _transformer(network)
    transformer.load_state_dict(to_diffusers(given, network.depth))
    assert trained.autoencoder is not None
    assert not isinstance(trained.autoencoder, Pixels)
    autoencoder, scale = _autoencoder(trained.autoencoder, trained.shift, trained.scale)
    with _complete(directory) as partial:
        transformer.save_pretrained(partial / "transformer")
        autoencoder.save_pretrained(partial / "vae")
        scheduler.save_pretrained(partial / "scheduler")
        index = {
            "_class_name": "DiTPipeline",
            "id2label": {str(label): name.replace(",", " ") for label, name in enumerate(trained.class_names)},
            "scheduler": ["diffusers", type(scheduler).__name__],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", type(autoencoder).__name__],
        }
        (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        if fitted is not None:
            save_file({name: weights[name].contiguous() for name in (TIME_IN, TIME_BIAS)}, partial / TIMESTEP_LAYER)
        channels = network.latent_channels
        _describe(trained, partial, [0.0] * channels, [scale] * channels)
        exported = Exported(directory, timesteps, steps)
        (partial / "README.md").write_text(card(Facts(trained, settings, "diffusers", timesteps, steps)))
    return exported


def export_safetensors(trained: Trained, directory: Path, settings: EvaluateParams) -> Exported:
    """Write any network: its weights under their own names, `dit.json`, which describes them, and the autoencoder."""
    with _complete(directory) as partial:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.network.state_dict().items()}
        save_file(weights, partial / WEIGHTS)
        if trained.autoencoder is not None and not isinstance(trained.autoencoder, Pixels):
            _clean(trained.autoencoder).save_pretrained(partial / "vae")
        _describe(trained, partial, list(trained.shift), list(trained.scale))
        (partial / "README.md").write_text(card(Facts(trained, settings, "safetensors", None, (settings.steps,))))
    return Exported(directory, None, (settings.steps,))


class _complete:  # noqa: N801 - a context manager
    """A folder that appears only when it is complete: written beside, then renamed. Raises `ConfigError` if it exists."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.partial = directory, directory.with_name(f".{directory.name}.partial")

    def __enter__(self) -> Path:
        if self.directory.exists():
            raise ConfigError(f"{self.directory} is there already; remove it, or give another directory")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.partial.replace(self.directory)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def _check_expressible(trained: Trained) -> None:
    """Raise `ConfigError` for what `DiTPipeline` cannot compute."""
    network, kind = trained.network, type(trained.network).__name__
    if type(network) is not DiT:
        raise ConfigError(f"{trained.name} is a {kind}, and diffusers has no class that computes the same; {INSTEAD}")
    if trained.diffusion.objective == "flow":
        raise ConfigError(f"{trained.name} learned a flow, and DiTPipeline runs no scheduler of flows; {INSTEAD}")
    if network.num_classes > NULL_CLASS:
        raise ConfigError(f"{trained.name} has {network.num_classes} classes, and DiTPipeline at most {NULL_CLASS}; {INSTEAD}")
    if trained.autoencoder is None:
        raise ConfigError(f"{trained.name} has no autoencoder here, and DiTPipeline needs one; give --vae, or {INSTEAD}")
    if isinstance(trained.autoencoder, Pixels):
        raise ConfigError(f"{trained.name} works on pixels, and diffusers has no autoencoder that leaves them alone; {INSTEAD}")


def _transformer(network: DiT) -> DiTTransformer2DModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DiTTransformer2DModel(
            num_attention_heads=network.num_heads,
            attention_head_dim=network.hidden_size // network.num_heads,
            in_channels=network.latent_channels,
            out_channels=network.out_channels,
            num_layers=network.depth,
            sample_size=network.latent_size,
            patch_size=network.patch_size,
            num_embeds_ada_norm=NULL_CLASS,
            norm_eps=1e-6,
        ).eval()


def _padded(table: Tensor) -> Tensor:
    """The class table (K + 1, D) with the null class moved to row 1000; rows of missing classes hold the null class too."""
    classes, null = table[:-1], table[-1:]
    return torch.cat([classes, null.expand(NULL_CLASS - len(classes) + 1, -1)])


def _scheduler(trained: Trained, settings: EvaluateParams) -> Any:
    """The scheduler of diffusers that visits this project's timesteps for `settings.steps` steps. Raises `ConfigError`."""
    diffusion = trained.diffusion
    if settings.scheduler == "ddpm":
        raise ConfigError(
            "--scheduler ddpm: DiTPipeline leaves a learned variance out and draws other noise; expected ddim or dpmsolver++"
        )
    wanted = sampled_timesteps(settings.scheduler, settings.timestep_spacing, diffusion.num_timesteps, settings.steps)
    noise = noise_schedule(diffusion)
    for spacing in ("leading", "trailing", "linspace"):
        if settings.scheduler == "dpmsolver++":
            made = DPMSolverMultistepScheduler(**noise, algorithm_type="dpmsolver++", timestep_spacing=spacing)
        elif spacing == "linspace" or diffusion.num_timesteps % settings.steps:
            continue  # with these settings DDIMScheduler does not step from one timestep of its list to the next
        else:
            made = DDIMScheduler(**noise, clip_sample=False, steps_offset=0, timestep_spacing=spacing)
        made.set_timesteps(settings.steps)
        if made.timesteps.tolist() == wanted:
            return made
    raise ConfigError(
        f"no scheduler of diffusers visits the timesteps of {settings.scheduler} with {settings.steps} steps and spacing "
        f"{settings.timestep_spacing}; take a number of steps that divides {diffusion.num_timesteps}, such as 20 or 50"
    )


def _fitted(
    weights: dict[str, Tensor], scheduler: Any, steps: int
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Tensor]]:
    """The timesteps that a pipeline may visit, the numbers of steps that visit them, and the weights fitted to them.

    These are the timesteps of `steps`, and, if one layer fits both, also those of the default number of `DiTPipeline`.
    """
    for counts in ((steps, PIPELINE_STEPS), (steps,)):
        timesteps = _timesteps(scheduler, dict.fromkeys(counts))
        found = fit(weights[TIME_IN], weights[TIME_BIAS], timesteps)
        if found.error <= LARGEST_ERROR:
            return timesteps, tuple(dict.fromkeys(counts)), {TIME_IN: found.weight, TIME_BIAS: found.bias}
    raise ConfigError(
        f"{steps} steps are too many for an exact export: diffusers' DiT embeds timesteps by other frequencies, and no layer "
        f"makes up for it at {len(timesteps)} of them (error {found.error:.1e}); give fewer --steps, such as 50, or --any-steps"
    )


def _timesteps(scheduler: Any, counts: Any) -> tuple[int, ...]:
    visited: set[int] = set()
    for count in counts:
        scheduler.set_timesteps(count)
        visited |= set(scheduler.timesteps.tolist())
    return tuple(sorted(visited))


def _autoencoder(
    autoencoder: AutoencoderKL | AutoencoderTiny, shift: Sequence[float], scale: Sequence[float]
) -> tuple[AutoencoderKL | AutoencoderTiny, float]:
    """An autoencoder for `DiTPipeline`, and the one factor by which the pipeline divides latents before it decodes them.

    A normalisation by channel or with a shift becomes part of the 1 x 1 convolutions next to the latents.
    """
    if len(set(scale)) == 1 and not any(shift):
        same = _clean(autoencoder)
        same.register_to_config(scaling_factor=scale[0])
        return same, scale[0]
    if isinstance(autoencoder, AutoencoderTiny):
        raise ConfigError(f"an AutoencoderTiny has no layer that could hold a shift or a scale of each channel; {INSTEAD}")
    config = {**autoencoder.config, "use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 1.0}
    stated = {key: None for key in ("shift_factor", "latents_mean", "latents_std") if key in config}
    folded = AutoencoderKL.from_config({**config, **stated}).eval().requires_grad_(False)
    weights = {name: tensor.cpu() for name, tensor in autoencoder.state_dict().items()}
    channels = len(scale)
    s, m = torch.tensor(scale).view(-1, 1, 1, 1), torch.tensor(shift)
    eye = torch.eye(2 * channels).view(2 * channels, 2 * channels, 1, 1)
    after = weights.get("post_quant_conv.weight", eye[:channels, :channels])  # (C, C, 1, 1), of raw latents
    weights["post_quant_conv.weight"] = after / s.view(1, -1, 1, 1)
    weights["post_quant_conv.bias"] = weights.get("post_quant_conv.bias", torch.zeros(channels)) + after[:, :, 0, 0] @ m
    before = weights.get("quant_conv.weight", eye)  # (2C, 2C, 1, 1): means, then logarithms of variances
    bias = weights.get("quant_conv.bias", torch.zeros(2 * channels))
    weights["quant_conv.weight"] = torch.cat([before[:channels] * s, before[channels:]])
    weights["quant_conv.bias"] = torch.cat([(bias[:channels] - m) * s.flatten(), bias[channels:] + 2 * s.flatten().abs().log()])
    folded.load_state_dict(weights)
    return folded, 1.0


def _clean(autoencoder: AutoencoderKL | AutoencoderTiny) -> AutoencoderKL | AutoencoderTiny:
    """A copy on the CPU, without the name or path that it was loaded from."""
    copy = type(autoencoder).from_config(dict(autoencoder.config))
    copy.load_state_dict(autoencoder.state_dict())
    copy.register_to_config(_name_or_path="")
    return copy


def _describe(trained: Trained, directory: Path, shift: list[float], scale: list[float]) -> None:
    about = {
        "name": trained.name,
        "model": trained.model.model_dump(mode="json"),
        "sizes": trained.sizes,
        "diffusion": trained.diffusion.model_dump(mode="json"),
        "normalize": {"shift": shift, "scale": scale},
        "class_names": list(trained.class_names),
        "pixels": isinstance(trained.autoencoder, Pixels),
        "about": dict(trained.about),
    }
    (directory / OWN).write_text(json.dumps(about, indent=2) + "\n")

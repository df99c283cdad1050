"""The parameters of a study as typed, validated objects: the only reader of `params.yaml`.

Nothing here has a default. Each value stands once, in `params.yaml`, and a value that is missing, unknown or out of range
is one error that names the file, the key, the value and what is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from dit import models
from dit.errors import ConfigError, explain
from dit.init.strategy import Strategy, claims
from dit.models import Denoiser
from dit.timesteps import check_sampler, scale_betas

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Backend = Literal["auto", "fused", "compiled", "eager"]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]

SCHEDULERS = {
    "eps": ("ddpm", "ddim", "dpmsolver++"),
    "x0": ("ddpm", "ddim", "dpmsolver++"),
    "v": ("ddpm", "ddim", "dpmsolver++"),
    "flow": ("flow_euler", "flow_heun"),
}
"""Which samplers fit which training objective."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StudyParams(Section):
    """Which strategies are compared, over which seeds."""

    name: Annotated[str, Field(min_length=1)]
    baseline: Name
    strategies: Annotated[list[Name], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> StudyParams:
        for key, values in (("strategies", self.strategies), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"{key} = {values}; accepted: each entry once")
        if self.baseline not in self.strategies:
            raise ValueError(f"baseline = '{self.baseline}'; accepted: one of study.strategies, {self.strategies}")
        return self


class PhotosSource(Section):
    """Class-conditional crops of the pictures that scikit-image ships; `dit.data.photos`."""

    kind: Literal["photos"]
    train_per_class: PositiveInt
    validation_per_class: PositiveInt
    validation_region: OpenFraction
    max_zoom: Annotated[float, Field(ge=1, allow_inf_nan=False)]


class FolderSource(Section):
    """Image files as `root/class/*.{jpg,png,webp}`; `dit.data.folder`."""

    kind: Literal["folder"]
    root: Path
    validation_root: Path | None
    validation_fraction: OpenFraction


class HuggingFaceSource(Section):
    """A data set of the `datasets` library; `dit.data.huggingface`."""

    kind: Literal["huggingface"]
    path: str
    config: str | None
    image_column: str
    label_column: str
    train_split: str
    validation_split: str | None
    validation_fraction: OpenFraction


class ImagesParams(Section):
    """Stage `images`."""

    size: Annotated[int, Field(ge=8)]
    seed: Seed
    workers: Count
    max_rejected: Fraction
    source: Annotated[PhotosSource | FolderSource | HuggingFaceSource, Field(discriminator="kind")]


class TrainedAutoencoder(Section):
    """Stage `autoencoder`, trained on the images of the study."""

    kind: Literal["train"]
    latent_channels: PositiveInt
    downsample: PositiveInt
    channels: Annotated[list[PositiveInt], Field(min_length=1)]
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    kl_weight: NonNegativeFloat
    seed: Seed
    threads: PositiveInt
    device: Device

    @model_validator(mode="after")
    def _consistent(self) -> TrainedAutoencoder:
        if self.downsample != 2 ** (len(self.channels) - 1):
            accepted = 2 ** (len(self.channels) - 1)
            raise ValueError(
                f"downsample = {self.downsample}; accepted: {accepted}, as channels has {len(self.channels)} entries"
            )
        return self


class PretrainedAutoencoder(Section):
    """Stage `autoencoder`, loaded from a hub id or a local directory in diffusers format."""

    kind: Literal["pretrained"]
    path: str
    revision: str | None
    latent_channels: PositiveInt
    downsample: PositiveInt
    threads: PositiveInt
    device: Device


class LatentsParams(Section):
    """Stage `latents`."""

    flip: bool
    normalize: Literal["per_channel", "global"] | PositiveFloat
    dtype: Literal["float32", "float16"]
    batch_size: PositiveInt
    precision: Precision
    backend: Backend
    processes: PositiveInt
    threads: PositiveInt
    device: Device


class ModelParams(Section):
    """The network: its name, and any options of its backbone, such as `depth`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    label_dropout: Annotated[float, Field(ge=0, lt=1)]

    @property
    def options(self) -> dict[str, Any]:
        """What stands beside the name; `dit.models.options_of` checks it."""
        return dict(self.model_extra or {})


class DiffusionParams(Section):
    """What the network predicts, and the noise it sees."""

    objective: Literal["eps", "x0", "v", "flow"]
    learn_sigma: bool
    num_timesteps: Annotated[int, Field(ge=2)]
    beta_start: OpenFraction
    beta_end: OpenFraction
    timestep_sampling: Literal["uniform", "logit_normal"]
    logit_normal_mean: Annotated[float, Field(allow_inf_nan=False)]
    logit_normal_std: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionParams:
        if self.learn_sigma and self.objective != "eps":
            raise ValueError(f"learn_sigma = true with objective '{self.objective}'; accepted: false, or objective 'eps'")
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start = {self.beta_start}; accepted: at most beta_end = {self.beta_end}")
        if self.objective != "flow":
            scale_betas(self.beta_start, self.beta_end, self.num_timesteps)
        return self


class ValidationParams(Section):
    """Fixed noise and timesteps on held-out latents."""

    samples: PositiveInt
    seed: Seed
    buckets: PositiveInt
    batch_size: PositiveInt

    @model_validator(mode="after")
    def _consistent(self) -> ValidationParams:
        if self.buckets > self.samples:
            raise ValueError(f"buckets = {self.buckets}; accepted: at most samples = {self.samples}")
        return self


class AnalyseParams(Section):
    """Stage `analyse@<strategy>`."""

    steps: Annotated[int, Field(ge=3)]
    batch_size: Annotated[int, Field(ge=2)]
    seed: Seed
    widths: Annotated[list[Annotated[int, Field(gt=0, multiple_of=64)]], Field(min_length=2)]
    threads: PositiveInt
    device: Device


class TrainParams(Section):
    """Stage `train@<strategy>-<seed>`."""

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: Count
    weight_decay: NonNegativeFloat
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    gradient_clip: PositiveFloat | None
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    log_every: PositiveInt
    diagnose_every: PositiveInt
    validate_every: PositiveInt
    validation: ValidationParams
    checkpoint_every: PositiveInt
    precision: Precision
    backend: Backend
    deterministic: bool
    processes: PositiveInt
    parallel: Literal["ddp", "fsdp"]
    threads: PositiveInt
    device: Device

    @model_validator(mode="after")
    def _consistent(self) -> TrainParams:
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size = {self.batch_size}; accepted: a multiple of processes = {self.processes}")
        if self.parallel == "fsdp" and self.backend == "fused":
            raise ValueError("backend = 'fused' with parallel = 'fsdp'; accepted: auto, compiled, eager, or parallel 'ddp'")
        return self


class EvaluateParams(Section):
    """Stage `evaluate@<strategy>-<seed>`."""

    num_samples: Annotated[int, Field(ge=2)]
    scheduler: Literal["ddpm", "ddim", "dpmsolver++", "flow_euler", "flow_heun"]
    steps: PositiveInt
    timestep_spacing: Literal["auto", "published", "leading", "linspace", "trailing"]
    ddpm_variance: Literal["fixed_large", "fixed_small"]
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    guidance_channels: Literal["all"] | PositiveInt
    seed: Seed
    batch_size: PositiveInt
    kernel_subset_size: Annotated[int, Field(ge=2)]
    kernel_subsets: PositiveInt
    nearest_k: PositiveInt
    grid_rows: PositiveInt
    precision: Precision
    backend: Backend
    processes: PositiveInt
    threads: PositiveInt
    device: Device


class FeaturesParams(Section):
    """The feature space of the distances, and stage `features`, which measures the real images in it."""

    extractor: Literal["efficientnet_lite0", "inception"]
    size: Annotated[int, Field(ge=32)]
    weights: Path | None
    batch_size: PositiveInt
    threads: PositiveInt
    device: Device

    @model_validator(mode="after")
    def _consistent(self) -> FeaturesParams:
        if self.extractor == "inception" and self.size != 299:
            raise ValueError(
                f"size = {self.size} with extractor 'inception'; accepted: 299, which its network resizes to by itself"
            )
        if self.extractor != "inception" and self.weights is not None:
            raise ValueError(f"weights = '{self.weights}' with extractor '{self.extractor}'; accepted: null")
        return self


class Params(Section):
    """A whole `params.yaml`."""

    study: StudyParams
    images: ImagesParams
    autoencoder: Annotated[TrainedAutoencoder | PretrainedAutoencoder, Field(discriminator="kind")]
    latents: LatentsParams
    model: ModelParams
    diffusion: DiffusionParams
    analyse: AnalyseParams
    train: TrainParams
    evaluate: EvaluateParams
    features: FeaturesParams
    strategies: dict[Name, Strategy]

    @property
    def latent_size(self) -> int:
        """Height and width of a latent, in latent pixels."""
        return self.images.size // self.autoencoder.downsample

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        self._check_shapes()
        self._check_strategies()
        self._check_evaluation()
        return self

    def network(self, sizes: Mapping[str, int], name: str | None = None) -> Denoiser:
        """The network of the study, or one called `name` in its place.

        `sizes` are the number of classes, and the size and channels of latents where they are not those of the study.
        """
        study = {"latent_size": self.latent_size, "latent_channels": self.autoencoder.latent_channels}
        options = {} if name else self.model.options
        return models.build(name or self.model.name, learn_sigma=self.diffusion.learn_sigma, **{**study, **sizes}, **options)

    def skeleton(self, name: str | None = None, num_classes: int = 1) -> Denoiser:
        """As `network`, without memory for its weights: to check parameters against."""
        with torch.device("meta"):
            return self.network({"num_classes": num_classes}, name)

    def _check_shapes(self) -> None:
        if self.images.size % self.autoencoder.downsample:
            raise ValueError(
                f"images.size = {self.images.size}: "
                f"expected a multiple of autoencoder.downsample = {self.autoencoder.downsample}"
            )
        try:
            self.skeleton()
        except ConfigError as error:
            raise ValueError(
                f"model.name = '{self.model.name}', on latents of {self.latent_size} x {self.latent_size} "
                f"(images.size {self.images.size} / autoencoder.downsample {self.autoencoder.downsample}): {error}"
            ) from None

    def _check_strategies(self) -> None:
        for name in self.study.strategies:
            if name not in self.strategies:
                raise ValueError(f"study.strategies: unknown strategy '{name}'; expected one of {', '.join(self.strategies)}")
        every_role = models.roles(self.skeleton())
        for name, strategy in self.strategies.items():
            try:
                claims(strategy, every_role)
            except ConfigError as error:
                if name in self.study.strategies:
                    raise ValueError(f"strategies.{name}.{error}") from None

    def _check_evaluation(self) -> None:
        accepted = SCHEDULERS[self.diffusion.objective]
        if self.evaluate.scheduler not in accepted:
            raise ValueError(
                f"evaluate.scheduler = '{self.evaluate.scheduler}' does not fit diffusion.objective = "
                f"'{self.diffusion.objective}'; accepted: {', '.join(accepted)}"
            )
        if self.evaluate.steps > self.diffusion.num_timesteps:
            raise ValueError(
                f"evaluate.steps = {self.evaluate.steps}; "
                f"accepted: at most diffusion.num_timesteps = {self.diffusion.num_timesteps}"
            )
        self._check_timesteps()
        self._check_guidance()
        if self.evaluate.kernel_subset_size > self.evaluate.num_samples:
            raise ValueError(
                f"evaluate.kernel_subset_size = {self.evaluate.kernel_subset_size}; "
                f"accepted: at most evaluate.num_samples = {self.evaluate.num_samples}"
            )
        if self.evaluate.nearest_k > self.evaluate.num_samples - 2:
            raise ValueError(
                f"evaluate.nearest_k = {self.evaluate.nearest_k}; "
                f"accepted: at most evaluate.num_samples - 2 = {self.evaluate.num_samples - 2}"
            )

    def _check_timesteps(self) -> None:
        evaluate, diffusion = self.evaluate, self.diffusion
        check_sampler(
            evaluate.scheduler,
            evaluate.timestep_spacing,
            evaluate.steps,
            num_timesteps=diffusion.num_timesteps,
            beta_start=diffusion.beta_start,
            beta_end=diffusion.beta_end,
        )

    def _check_guidance(self) -> None:
        channels = self.evaluate.guidance_channels
        if channels != "all" and channels > self.autoencoder.latent_channels:
            raise ValueError(
                f"evaluate.guidance_channels = {channels}; "
                f"expected 'all' or at most autoencoder.latent_channels = {self.autoencoder.latent_channels}"
            )
        if self.evaluate.guidance_scale > 1 and not self.model.label_dropout:
            raise ValueError(
                f"evaluate.guidance_scale = {self.evaluate.guidance_scale} with model.label_dropout = 0, which never trains "
                f"the null class that guidance needs; accepted: evaluate.guidance_scale 1, or model.label_dropout above 0"
            )


class _Loader(yaml.SafeLoader):
    """Refuses a key that a section has twice; YAML forbids it, PyYAML takes the last, and DVC stops."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file. Raises `ConfigError` that names every wrong key, its value and what is accepted."""
    try:
        with Path(path).open() as file:
            data: Any = yaml.load(file, Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run this in a folder with a params.yaml") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    return parse(data, path)


def parse(data: Any, where: str | Path = "params.yaml") -> Params:
    """Check parameters that were already read; `where` stands in the messages."""
    try:
        return Params.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, str(where), data)) from None

"""The sections of `params.yaml` as typed, validated objects.

Nothing here has a default. Each value stands once, in `params.yaml`; `dit.config` reads the whole file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dit.sections.optim import ConstantSchedule, DecaySchedule, OptimizerParams, ScheduleParams, WSDSchedule
from dit.sections.types import (
    Backend,
    Count,
    Device,
    FilePath,
    Fraction,
    Name,
    NonNegativeFloat,
    OpenFraction,
    Precision,
    Section,
    Seed,
)
from dit.timesteps import scale_betas

SCHEDULERS = {
    "eps": ("ddpm", "ddim", "dpmsolver++"),
    "x0": ("ddpm", "ddim", "dpmsolver++"),
    "v": ("ddpm", "ddim", "dpmsolver++"),
    "flow": ("flow_euler", "flow_heun"),
}
"""Which samplers fit which training objective."""


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
    """Class-conditional crops of the pictures that scikit-image ships; `dit.data.sources.photos`."""

    kind: Literal["photos"]
    train_per_class: PositiveInt
    validation_per_class: PositiveInt
    validation_region: OpenFraction
    max_zoom: Annotated[float, Field(ge=1, allow_inf_nan=False)]


class FolderSource(Section):
    """Image files as `root/class/*.{jpg,png,webp}`; `dit.data.sources.folder`."""

    kind: Literal["folder"]
    root: FilePath
    validation_root: FilePath | None
    validation_fraction: OpenFraction


class HuggingFaceSource(Section):
    """A data set of the `datasets` library; `dit.data.sources.huggingface`."""

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

    model_config = ConfigDict(extra="allow")

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
    schedule: ScheduleParams
    optimizer: OptimizerParams
    gradient_clip: PositiveFloat | None
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    log_every: PositiveInt
    diagnose_every: PositiveInt
    validate_every: PositiveInt
    validation: ValidationParams
    checkpoint_every: PositiveInt
    keep_checkpoints: Annotated[tuple[PositiveInt | Literal["last"], ...], Field(strict=False)] = ()
    """Steps whose checkpoints outlive the run, and `last`, from which a run goes on when `steps` is raised; may be left out."""
    stop_on_collapse: bool
    precision: Precision
    backend: Backend
    deterministic: bool
    processes: PositiveInt
    parallel: Literal["ddp", "fsdp"]
    threads: PositiveInt
    device: Device

    @property
    def depends_on_length(self) -> bool:
        """Whether a step before the last one depends on `steps`, as the learning rate of a decay does."""
        return not isinstance(self.schedule, ConstantSchedule)

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that may be left out is no part of parameters that do not have it, nor of their digest."""
        written: dict[str, Any] = serialize(self)
        if not self.keep_checkpoints:
            written.pop("keep_checkpoints", None)
        return written

    @model_validator(mode="after")
    def _consistent(self) -> TrainParams:
        late = [step for step in self.keep_checkpoints if step != "last" and step >= self.steps]
        if late:
            raise ValueError(
                f"keep_checkpoints: no checkpoint is due at {late[0]}; expected less than steps = {self.steps}, or last"
            )
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size = {self.batch_size}; accepted: a multiple of processes = {self.processes}")
        if self.parallel == "fsdp" and self.backend == "fused":
            raise ValueError("backend = 'fused' with parallel = 'fsdp'; accepted: auto, compiled, eager, or parallel 'ddp'")
        if isinstance(self.schedule, DecaySchedule) and self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps}: expected less than steps = {self.steps}, "
                "as the decay comes after the warm-up"
            )
        if isinstance(self.schedule, WSDSchedule) and self.schedule.warmup_steps + self.schedule.decay_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps} and schedule.decay_steps = "
                f"{self.schedule.decay_steps}: expected at most steps = {self.steps} together"
            )
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
    weights: FilePath | None
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

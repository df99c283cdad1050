"""The sections of `params.yaml` as typed, validated objects.

Values have no defaults here: each stands in `params.yaml`, except the few that may be left out. `dit.config` reads the file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dit.sections.data import (
    FolderSource as FolderSource,
    HuggingFaceSource as HuggingFaceSource,
    IdentityAutoencoder as IdentityAutoencoder,
    IdxSource as IdxSource,
    ImagesParams as ImagesParams,
    LatentsParams as LatentsParams,
    MeanAndStd as MeanAndStd,
    PhotosSource as PhotosSource,
    PretrainedAutoencoder as PretrainedAutoencoder,
    ShiftAndScale as ShiftAndScale,
    TrainedAutoencoder as TrainedAutoencoder,
    UnlabelledSource as UnlabelledSource,
    WebDatasetSource as WebDatasetSource,
)
from dit.sections.optim import ConstantSchedule, DecaySchedule, OptimizerParams, ScheduleParams, WSDSchedule
from dit.sections.types import (
    LARGEST,
    MOST_PIXELS,
    MOST_SETTINGS,
    Backend,
    Device,
    FilePath,
    LevelName,
    Name,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Precision,
    Section,
    Seed,
    Threads,
)
from dit.timesteps import scale_betas

SCHEDULERS = {
    "eps": ("ddpm", "ddim", "dpmsolver++"),
    "x0": ("ddpm", "ddim", "dpmsolver++"),
    "v": ("ddpm", "ddim", "dpmsolver++"),
    "flow": ("flow_euler", "flow_heun"),
}
"""By training objective, the samplers that fit it."""


Factors = dict[str, list[Any] | dict[LevelName, Any]]
"""Levels by dotted key of `params.yaml`: a list of values, or values with names."""


class StudyParams(Section):
    """The strategies that are compared, the factors that are crossed with them, the seeds, and which runs are sampled.

    The keys below `seeds` may be left out: without them, each strategy runs once with every seed, and all runs are sampled.
    """

    name: Annotated[str, Field(min_length=1)]
    baseline: Name
    strategies: Annotated[list[Name], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    factors: Factors = Field(default_factory=dict)
    """Parameters and their levels, which are crossed with each other and with strategies and seeds."""
    settings: dict[LevelName, dict[str, Any]] = Field(default_factory=dict)
    """In place of `factors`: named combinations of parameters, for studies whose full product would be too large."""
    only: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """By strategy and key: a value, or levels, that this strategy has instead of those in `params.yaml` and `factors`."""
    choose_on: list[Seed] = Field(default_factory=list)
    """The seeds on which each strategy's best learning rate is chosen. Results are reported on the other seeds only."""
    declared: list[Name] = Field(default_factory=list)
    """The strategies whose comparison with the baseline is primary. Names that are not in `strategies` are ignored."""
    sample: Literal["all", "best", "one", "none"] = "all"
    """Which runs are sampled: all; `best`, the runs at each strategy's best setting; `one`, one of these for each strategy (for
    its pictures); or none.
    """

    def fixed(self, strategy: str) -> dict[str, Any]:
        """By key, the single values that `only` gives `strategy`; they hold at every setting of the strategy."""
        own = self.only.get(strategy, {})
        return {key: value for key, value in own.items() if not isinstance(value, (list, dict))}

    @property
    def primary(self) -> list[str]:
        """The declared strategies that are in the study. Verdicts on them are corrected for their number."""
        return [name for name in self.declared if name in self.strategies]

    @model_validator(mode="after")
    def _consistent(self) -> StudyParams:
        for key, values in (("strategies", self.strategies), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"{key} = {values}: expected each entry once")
        if self.baseline not in self.strategies:
            raise ValueError(f"baseline = '{self.baseline}': expected one of study.strategies, {self.strategies}")
        if self.baseline in self.declared:
            raise ValueError(f"declared: '{self.baseline}' is the baseline, with which the others are compared; leave it out")
        if self.factors and self.settings:
            raise ValueError("factors and settings are both given: expected one of them")
        for name in self.only if self.settings else ():
            for key in self.only[name].keys() - self.fixed(name).keys():
                raise ValueError(f"only.{name}.{key} gives levels, which settings do not have: expected one value, or factors")
        self._check_levels()
        self._check_choice()
        return self

    def _check_levels(self) -> None:
        given = [("factors", self.factors), *((f"settings.{name}", levels) for name, levels in self.settings.items())]
        for where, keys in (*given, *((f"only.{name}", values) for name, values in self.only.items())):
            for key in keys:
                if "." not in key or key.partition(".")[0] in ("study", "strategies"):
                    raise ValueError(f"{where}.{key}: expected a dotted key of params.yaml, such as train.learning_rate")
        for key, levels in self.factors.items():
            values = list(levels.values()) if isinstance(levels, dict) else levels
            if len(values) > MOST_SETTINGS:
                raise ValueError(f"factors.{key} has {len(values):,} levels: expected at most {MOST_SETTINGS}")
            if not values or any(value in values[:index] for index, value in enumerate(values)):
                raise ValueError(f"factors.{key} = {levels}: expected at least one level, and each level once")

    def _check_choice(self) -> None:
        if not self.choose_on:
            return
        others = [seed for seed in self.seeds if seed not in self.choose_on]
        if not set(self.choose_on) < set(self.seeds):
            raise ValueError(f"choose_on = {self.choose_on}: expected some of study.seeds = {self.seeds}, and not all of them")
        if len(others) < 3:
            raise ValueError(
                f"choose_on = {self.choose_on} leaves {len(others)} of the seeds {self.seeds} to report: expected at least 3"
            )


class ModelParams(Section):
    """The network: its name, and any options of its backbone, such as `depth`."""

    model_config = ConfigDict(extra="allow")

    name: str
    label_dropout: Annotated[float, Field(ge=0, lt=1)]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the backbone; `dit.models.options_of` checks them."""
        return dict(self.model_extra or {})


class DiffusionParams(Section):
    """What the network predicts, and the noise of its inputs."""

    objective: Literal["eps", "x0", "v", "flow"]
    learn_sigma: bool
    num_timesteps: Annotated[int, Field(ge=2, le=10**6)]
    beta_start: OpenFraction
    beta_end: OpenFraction
    timestep_sampling: Literal["uniform", "logit_normal"]
    logit_normal_mean: Annotated[float, Field(allow_inf_nan=False)]
    logit_normal_std: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionParams:
        if self.learn_sigma and self.objective != "eps":
            raise ValueError(
                f"learn_sigma = true with objective '{self.objective}'; learn_sigma should be false, or objective 'eps'"
            )
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start = {self.beta_start}; it should be at most beta_end = {self.beta_end}")
        if self.objective != "flow":
            scale_betas(self.beta_start, self.beta_end, self.num_timesteps)
        return self


class ValidationParams(Section):
    """Validation with fixed noise and timesteps on held-out latents."""

    samples: PositiveInt
    seed: Seed
    buckets: PositiveInt
    batch_size: PositiveInt

    @model_validator(mode="after")
    def _consistent(self) -> ValidationParams:
        if self.buckets > self.samples:
            raise ValueError(f"buckets = {self.buckets}; it should be at most samples = {self.samples}")
        return self


class AnalyseParams(Section):
    """Stage `analyse@<strategy>`."""

    steps: Annotated[int, Field(ge=3, le=LARGEST)]
    batch_size: Annotated[int, Field(ge=2, le=LARGEST)]
    seed: Seed
    widths: Annotated[list[Annotated[int, Field(gt=0, le=2**16, multiple_of=64)]], Field(min_length=2)]
    threads: Threads
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
    """Steps whose checkpoints are kept after the run. `last` keeps the last checkpoint, from which a run with more steps can
    continue. May be left out.
    """
    stop_on_collapse: bool
    precision: Precision
    backend: Backend
    deterministic: bool
    processes: PositiveInt
    parallel: Literal["ddp", "fsdp"]
    threads: Threads
    device: Device

    @property
    def depends_on_length(self) -> bool:
        """Whether any step before the last one depends on `steps`, as it does if the learning rate decays."""
        return not isinstance(self.schedule, ConstantSchedule)

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit a key that was left out, so that parameters without it, and their digest, stay the same."""
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
            raise ValueError(f"batch_size = {self.batch_size}; it should be a multiple of processes = {self.processes}")
        if self.parallel == "fsdp" and self.backend == "fused":
            raise ValueError("backend = 'fused' with parallel = 'fsdp'; use another backend, or parallel 'ddp'")
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

    num_samples: Annotated[int, Field(ge=2, le=LARGEST)]
    scheduler: Literal["ddpm", "ddim", "dpmsolver++", "flow_euler", "flow_heun"]
    steps: PositiveInt
    timestep_spacing: Literal["auto", "published", "leading", "linspace", "trailing"]
    ddpm_variance: Literal["fixed_large", "fixed_small"]
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    guidance_channels: Literal["all"] | PositiveInt
    seed: Seed
    batch_size: PositiveInt
    kernel_subset_size: Annotated[int, Field(ge=2, le=LARGEST)]
    kernel_subsets: PositiveInt
    nearest_k: PositiveInt
    reference: FilePath | None = None
    """A file with statistics of other images, such as the reference of a published table, with which samples are also compared.
    May be left out.
    """
    grid_rows: PositiveInt
    precision: Precision
    backend: Backend
    processes: PositiveInt
    threads: Threads
    device: Device

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """See `TrainParams`."""
        written: dict[str, Any] = serialize(self)
        if self.reference is None:
            written.pop("reference", None)
        return written


class FeaturesParams(Section):
    """The feature space of the distances, and stage `features`, which measures the real images in it."""

    extractor: Literal["efficientnet_lite0", "inception"]
    size: Annotated[int, Field(ge=32, le=MOST_PIXELS)]
    weights: FilePath | None
    batch_size: PositiveInt
    threads: Threads
    device: Device

    @model_validator(mode="after")
    def _consistent(self) -> FeaturesParams:
        if self.extractor == "inception" and self.size != 299:
            raise ValueError(
                f"size = {self.size} with extractor 'inception'; it should be 299, to which its network resizes by itself"
            )
        if self.extractor != "inception" and self.weights is not None:
            raise ValueError(f"weights = '{self.weights}' with extractor '{self.extractor}'; it should be null")
        return self

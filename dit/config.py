"""A whole `params.yaml`: this is the only module that reads it.

For a value that is missing, unknown or out of range, the error names the file, the key, the value and what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import torch
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator
from torch.overrides import TorchFunctionMode

from dit import models, yamlfile
from dit.errors import ConfigError, did_you_mean, explain
from dit.init.strategy import Strategy, claims, named_strategies
from dit.models import Denoiser, Role
from dit.optim.optimizer import check as check_optimizer
from dit.sections import (
    SCHEDULERS,
    AnalyseParams,
    DiffusionParams,
    EvaluateParams,
    FeaturesParams,
    IdentityAutoencoder,
    ImagesParams,
    LatentsParams,
    MeanAndStd,
    ModelParams,
    Name,
    PretrainedAutoencoder,
    Section,
    ShiftAndScale,
    StudyParams,
    TrainedAutoencoder,
    TrainParams,
)
from dit.timesteps import check_sampler


class _NoInitialisers(TorchFunctionMode):
    """In this mode `torch.nn.init` does nothing. On the meta device it would import torch's compiler, which takes seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


_SKELETONS: dict[str, Denoiser] = {}
"""The skeleton that was built last, by the parameters that determine it."""


MOST_CLAIMS = 5_000_000
"""Most pairs of a rule (of any strategy of a study) and a role (of its network); comparing a pair takes about a microsecond."""
_FITTING: WeakKeyDictionary[Denoiser, set[str]] = WeakKeyDictionary()
"""By skeleton, the strategies that fit it, so that each is checked once: a network of a thousand blocks has 15,000 roles."""


@lru_cache(maxsize=1)
def _roles(skeleton: Denoiser) -> list[Role]:
    return models.roles(skeleton)


class Params(Section):
    """A whole `params.yaml`."""

    study: StudyParams
    images: ImagesParams
    autoencoder: Annotated[TrainedAutoencoder | PretrainedAutoencoder | IdentityAutoencoder, Field(discriminator="kind")]
    latents: LatentsParams
    model: ModelParams
    diffusion: DiffusionParams
    analyse: AnalyseParams
    train: TrainParams
    evaluate: EvaluateParams
    features: FeaturesParams
    strategies: dict[Name, Strategy]
    """The strategies of the library, then the strategies of the file, which must have other names."""
    _written: dict[str, Any] = PrivateAttr(default_factory=dict)
    """The data of the file as it was read; `with_values` changes a copy of it."""

    @property
    def latent_size(self) -> int:
        """Height and width of a latent, in latent pixels."""
        return self.images.size // self.autoencoder.downsample

    @field_validator("strategies")
    @classmethod
    def _with_library(cls, own: dict[Name, Strategy]) -> dict[Name, Strategy]:
        library = named_strategies()
        for name in own.keys() & library.keys():
            raise ValueError(
                f"the library has a strategy called '{name}' (dit/library.yaml); give yours another name, or edit that one"
            )
        return {**library, **own}

    def with_values(self, values: Mapping[str, Any], where: str = "params.yaml") -> Params:
        """These parameters with other values of dotted keys such as `train.steps`.

        Raises `ConfigError` for a key that does not exist and for a value that does not fit; the message starts with `where`.
        """
        if not values:
            return self
        data = deepcopy(self._written)
        for key, value in values.items():
            *sections, last = key.split(".")
            section: Any = data
            for name in sections:
                section = section.get(name) if isinstance(section, dict) else None
            if not isinstance(section, dict):
                known = [name for name in _dotted(self._written) if not name.startswith("study.")]  # no factor sets a study key
                hint = did_you_mean(key, known) or "; expected a key of params.yaml, such as train.steps"
                raise ConfigError(f"{where}: {key} is not a known key{hint}")
            section[last] = value
        return parse(data, where)

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        self._check_latents()
        self._check_shapes()
        self._check_objective()
        self._check_strategies()
        self._check_optimizer()
        self._check_evaluation()
        return self

    def network(self, sizes: Mapping[str, int], name: str | None = None) -> Denoiser:
        """The network of the study, or the network called `name` instead.

        `sizes` holds the number of classes, and also the size and channels of latents if they differ from those of the study.
        The network called `name` may be one that the objective of the study cannot train, such as one without a learned sigma.
        """
        study = {"latent_size": self.latent_size, "latent_channels": self.autoencoder.latent_channels}
        options = {} if name else self.model.options
        chosen = name or self.model.name
        learn_sigma = self.diffusion.learn_sigma and "eps" in models.backbone_named(chosen).objectives
        return models.build(chosen, learn_sigma=learn_sigma, **{**study, **sizes}, **options)

    def skeleton(self, name: str | None = None, num_classes: int = 1) -> Denoiser:
        """The result of `network` on the meta device, where weights have no values and take no memory; for checks."""
        called = models.backbone_named(name or self.model.name).called_when_built
        with torch.device("meta"), nullcontext() if called else _NoInitialisers():
            return self.network({"num_classes": num_classes}, name)

    @cached_property
    def own_skeleton(self) -> Denoiser:
        """The skeleton of the study's own network, for one class. Parameters with equal networks share one skeleton."""
        if models.backbone_named(self.model.name).called_when_built:  # a user's code may build another network each time
            return self.skeleton()
        key = repr((self.model, self.latent_size, self.autoencoder.latent_channels, self.diffusion.learn_sigma))
        if key not in _SKELETONS:
            _SKELETONS.clear()
            _SKELETONS[key] = self.skeleton()
        return _SKELETONS[key]

    @cached_property
    def roles(self) -> list[Role]:
        """The roles of the study's network. Parameters that share a skeleton share its roles."""
        return _roles(self.own_skeleton)

    def _check_latents(self) -> None:
        autoencoder, normalize = self.autoencoder, self.latents.normalize
        if isinstance(autoencoder, IdentityAutoencoder) and autoencoder.latent_channels != self.images.channels:
            raise ValueError(
                f"autoencoder.latent_channels = {autoencoder.latent_channels} with autoencoder.kind = 'identity': "
                f"expected images.channels = {self.images.channels}"
            )
        if normalize == "published" and not isinstance(autoencoder, PretrainedAutoencoder):
            raise ValueError(
                f"latents.normalize = 'published' with autoencoder.kind = '{autoencoder.kind}': "
                "expected auto, or autoencoder.kind = 'pretrained'"
            )
        if isinstance(normalize, (ShiftAndScale, MeanAndStd)):
            try:
                normalize.factors(autoencoder.latent_channels)
            except ConfigError as error:
                raise ValueError(str(error)) from None

    def _check_shapes(self) -> None:
        if self.images.size % self.autoencoder.downsample:
            raise ValueError(
                f"images.size = {self.images.size}: "
                f"expected a multiple of autoencoder.downsample = {self.autoencoder.downsample}"
            )
        try:
            _ = self.own_skeleton
        except ConfigError as error:
            raise ValueError(
                f"model.name = '{self.model.name}', on latents of {self.latent_size} x {self.latent_size} "
                f"(images.size {self.images.size} / autoencoder.downsample {self.autoencoder.downsample}): {error}"
            ) from None

    def _check_objective(self) -> None:
        backbone, objective = models.backbone_named(self.model.name), self.diffusion.objective
        if objective not in backbone.objectives:
            raise ValueError(
                f"diffusion.objective = '{objective}' does not fit model.name = '{self.model.name}': "
                f"expected {' or '.join(backbone.objectives)}, and diffusion.learn_sigma false unless the objective is eps"
            )
        steps = self.diffusion.num_timesteps
        if backbone.num_timesteps not in (None, steps):
            raise ValueError(
                f"diffusion.num_timesteps = {steps} does not fit model.name = '{self.model.name}', "
                f"whose time is t / {backbone.num_timesteps}: expected {backbone.num_timesteps}"
            )

    def _check_strategies(self) -> None:
        for key in ("strategies", "declared", "only"):
            for name in getattr(self.study, key):
                if name not in self.strategies:
                    hint = did_you_mean(name, self.strategies) or f"; expected one of {', '.join(self.strategies)}"
                    raise ValueError(f"study.{key}: unknown strategy '{name}'{hint}")
        rules = sum(len(self.strategies[name].rules) for name in self.study.strategies)
        if rules * len(self.roles) > MOST_CLAIMS:
            most = MOST_CLAIMS // len(self.roles)
            raise ValueError(
                f"study.strategies: they have {rules:,} rules, for {len(self.roles):,} roles; expected at most {most:,} rules"
            )
        fitting = _FITTING.setdefault(self.own_skeleton, set())
        for name in self.study.strategies:
            written = repr(self.strategies[name])
            if written in fitting:
                continue
            try:
                claims(self.strategies[name], self.roles)
            except ConfigError as error:
                raise ValueError(f"strategies.{name}.{error}") from None
            fitting.add(written)

    def _check_optimizer(self) -> None:
        try:
            check_optimizer(self.train, self.roles)
        except ConfigError as error:
            raise ValueError(f"train.{error}") from None

    def _check_evaluation(self) -> None:
        fitting = SCHEDULERS[self.diffusion.objective]
        if self.evaluate.scheduler not in fitting:
            raise ValueError(
                f"evaluate.scheduler = '{self.evaluate.scheduler}' does not fit diffusion.objective = "
                f"'{self.diffusion.objective}'; expected one of {', '.join(fitting)}"
            )
        if self.evaluate.steps > self.diffusion.num_timesteps:
            raise ValueError(
                f"evaluate.steps = {self.evaluate.steps}; "
                f"it should be at most diffusion.num_timesteps = {self.diffusion.num_timesteps}"
            )
        self._check_timesteps()
        self._check_guidance()
        if self.evaluate.kernel_subset_size > self.evaluate.num_samples:
            raise ValueError(
                f"evaluate.kernel_subset_size = {self.evaluate.kernel_subset_size}; "
                f"it should be at most evaluate.num_samples = {self.evaluate.num_samples}"
            )
        if self.evaluate.nearest_k > self.evaluate.num_samples - 2:
            raise ValueError(
                f"evaluate.nearest_k = {self.evaluate.nearest_k}; "
                f"it should be at most evaluate.num_samples - 2 = {self.evaluate.num_samples - 2}"
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
                f"the null class that guidance needs; set evaluate.guidance_scale to 1, or model.label_dropout above 0"
            )


def _dotted(data: Mapping[str, Any]) -> Iterator[str]:
    """All keys of nested mappings, with dots: the key of each mapping, then the keys inside it."""
    for key, value in data.items():
        yield key
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in _dotted(value))


def shipped() -> Path:
    """The file of all defaults: beside this module in an installed package, at the root of a source tree."""
    installed = Path(__file__).with_name("params.yaml")
    return installed if installed.is_file() else Path(__file__).parents[1] / "params.yaml"


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file. Raises `ConfigError` that names every wrong key, its value and what is expected."""
    try:
        data = yamlfile.read(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run this in a folder with a params.yaml") from None
    return parse(data, path)


def parse(data: Any, where: str | Path = "params.yaml") -> Params:
    """Check parameters that were already read; messages call their source `where`."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected sections such as `study:` and `train:`, and found {type(data).__name__}")
    try:
        params = Params.model_validate(data)
        params._written = data
        return params
    except ValidationError as error:
        raise ConfigError(explain(error, str(where), data, Params)) from None

"""`train.optimizer` and `train.schedule` of `params.yaml`. What they compute is in `dit.optim`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dit.sections.types import Count, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section

Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Decay, Decay], Field(strict=False)]
Selectors = str | Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
"""One role selector, or several; see `dit.init.selectors`."""


class ParameterGroup(Section):
    """Weights, selected by role, and the multipliers of their learning rate and weight decay."""

    role: Selectors
    learning_rate_multiplier: PositiveFloat = 1.0
    weight_decay_multiplier: NonNegativeFloat = 1.0
    base_fan_in: PositiveInt | None = None
    """If given, the learning rate is also multiplied by base_fan_in / fan_in, the width rule of µP for Adam."""


class OptimizerSection(Section):
    """The keys of every optimiser. If an optimiser decouples `weight_decay`, it multiplies it by the learning rate."""

    groups: Annotated[tuple[ParameterGroup, ...], Field(strict=False)]
    """Later groups override earlier ones; weights that no group names have multipliers of 1."""


class AdamWParams(OptimizerSection):
    """AdamW; Loshchilov & Hutter (2019)."""

    name: Literal["adamw"]
    betas: Betas
    weight_decay: NonNegativeFloat


class SGDParams(OptimizerSection):
    """Stochastic gradient descent with momentum; `torch.optim.SGD`."""

    name: Literal["sgd"]
    momentum: Decay
    nesterov: bool
    weight_decay: NonNegativeFloat


class MuonParams(OptimizerSection):
    """Muon for the matrices that `hidden` names, AdamW for all other weights; Jordan et al. (2024), `torch.optim.Muon`.

    `learning_rate_multiplier` and `weight_decay` belong to the hidden matrices, `betas` and `adamw_weight_decay` to the rest.
    """

    name: Literal["muon"]
    hidden: Selectors
    momentum: Decay
    nesterov: bool
    adjust_lr_fn: Literal["original", "match_rms_adamw"]
    learning_rate_multiplier: PositiveFloat
    weight_decay: NonNegativeFloat
    betas: Betas
    adamw_weight_decay: NonNegativeFloat


class NamedOptimizerParams(OptimizerSection):
    """Any class of `torch.optim`, by name, and its arguments other than the weights and the learning rate."""

    name: str
    arguments: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _has_arguments(cls, data: Any) -> Any:
        """Name the choices in one error; otherwise each key of another optimiser would be an error too."""
        if isinstance(data, Mapping) and "arguments" not in data:
            raise ValueError(
                f"name = {data.get('name')!r}: expected adamw, sgd or muon, or a class of torch.optim and its arguments, "
                "such as {name: Adam, arguments: {}}"
            )
        return data


def _kind(data: Any) -> str:
    name = data.get("name") if isinstance(data, Mapping) else getattr(data, "name", None)
    return name if name in ("adamw", "sgd", "muon") else "named"


OptimizerParams = Annotated[
    Annotated[AdamWParams, Tag("adamw")]
    | Annotated[SGDParams, Tag("sgd")]
    | Annotated[MuonParams, Tag("muon")]
    | Annotated[NamedOptimizerParams, Tag("named")],
    Discriminator(_kind),
]


class ScheduleSection(Section):
    """The keys of every schedule: a linear warm-up, whose last step is the first with the full learning rate."""

    warmup_steps: Count


class ConstantSchedule(ScheduleSection):
    """The full learning rate after the warm-up."""

    name: Literal["constant"]


class DecaySchedule(ScheduleSection):
    """A decay, along a line or half a cosine, from the end of the warm-up to the end of training."""

    name: Literal["linear", "cosine"]
    final_fraction: Fraction
    """The fraction of the learning rate at which the decay ends."""


class WSDSchedule(ScheduleSection):
    """Warm-up, stable, decay: the full learning rate until the last `decay_steps`, in which it falls along a line."""

    name: Literal["wsd"]
    decay_steps: PositiveInt
    final_fraction: Fraction
    """The fraction of the learning rate at which the decay ends."""


ScheduleParams = Annotated[ConstantSchedule | DecaySchedule | WSDSchedule, Field(discriminator="name")]

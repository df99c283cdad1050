"""Optimisers by name: the classes of `torch.optim`, and functions for optimisers that `torch.optim` does not have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from dit.errors import ConfigError
from dit.sections.optim import AdamWParams, MuonParams, NamedOptimizerParams, OptimizerParams, SGDParams

Make = Callable[..., torch.optim.Optimizer]
"""A function that makes an optimiser from parameter groups, the learning rate `lr`, and the arguments of `train.optimizer`."""

OUTSIDE: dict[str, Make] = {}
"""Optimisers that `torch.optim` does not have. To add one, define its function here, and name it in this table."""

OWN = ("adamw", "sgd", "muon")
"""The optimisers that have a section class of their own in `dit.sections.optim`."""

GIVEN = {"params": "the network gives the weights", "lr": "train.learning_rate is the learning rate"}
"""The keys that `arguments` must not contain, each with the reason."""

NOT_SERVED = {
    "Optimizer": "it is the base class of all optimisers",
    "LBFGS": "it evaluates the loss several times a step",
    "SparseAdam": "it needs sparse gradients",
    "Muon": "it takes only matrices; `name: muon` gives the other weights to AdamW",
}
"""Classes of `torch.optim` that cannot train a network here, each with the reason."""

ELEMENTWISE = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
"""Classes that, apart from weight decay, change each entry of a weight from its own gradients only."""


def is_elementwise(params: OptimizerParams) -> bool:
    """Whether an entry with zero gradients keeps its value, and entries with equal gradients change equally, except for weight
    decay.
    """
    return isinstance(params, AdamWParams | SGDParams) or params.name in ELEMENTWISE


def shards(params: OptimizerParams) -> bool:
    """Whether the optimiser is known to work on weights that are sharded (FSDP)."""
    return is_elementwise(params) or isinstance(params, MuonParams)


def maker(params: NamedOptimizerParams) -> Make:
    """The function that makes the optimiser. Raises `ConfigError` for an unknown name or for wrong arguments."""
    known = [*OWN, *OUTSIDE, *torch_names()]
    if params.name in NOT_SERVED:
        raise ConfigError(f"name = '{params.name}': {NOT_SERVED[params.name]}; expected one of {', '.join(known)}")
    if params.name not in known:
        near = get_close_matches(params.name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"name = '{params.name}' is not an optimiser{hint}; expected one of {', '.join(known)}")
    make: Make = OUTSIDE.get(params.name) or getattr(torch.optim, params.name)
    _check_arguments(params.name, make, params.arguments)
    return make


def torch_names() -> list[str]:
    """The names of the classes of `torch.optim` that `train.optimizer` may name."""
    members = inspect.getmembers(torch.optim, inspect.isclass)
    return [name for name, kind in members if issubclass(kind, torch.optim.Optimizer) and name not in NOT_SERVED]


def weight_decay_of(make: Make, params: NamedOptimizerParams) -> float | None:
    """The weight decay of an optimiser: from `arguments`, else its default; None if it has no weight decay."""
    argument = inspect.signature(make).parameters.get("weight_decay")
    return None if argument is None else params.arguments.get("weight_decay", argument.default)


def _check_arguments(name: str, make: Make, arguments: Mapping[str, Any]) -> None:
    known = [key for key in inspect.signature(make).parameters if key not in GIVEN]
    for key in arguments:
        if key in GIVEN:
            raise ConfigError(f"arguments.{key} must not be given: {GIVEN[key]}")
        if key not in known:
            raise ConfigError(f"arguments.{key} is not an argument of {name}; expected one of {', '.join(known)}")
    try:
        make([torch.nn.Parameter(torch.zeros(1, 1))], lr=1.0, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"arguments = {dict(arguments)}: {name} refuses them: {error}") from None

"""Finds the weights whose optimiser state another optimiser can take over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dit.models import Role
from dit.optim.optimizer import hidden_weights
from dit.sections.optim import AdamWParams, MuonParams, OptimizerParams, SGDParams

ADDING_STATE = ("amsgrad", "centered", "momentum")
"""Arguments of `torch.optim` that add state: amsgrad of Adam, centered of RMSprop, momentum of RMSprop and SGD."""

Rule = tuple[str, ...]
"""How a weight is updated: the name of an optimiser, and the given arguments that add state."""


def carried(before: OptimizerParams, after: OptimizerParams, every_role: Sequence[Role]) -> set[str]:
    """The names of the weights that both optimisers update by the same rule, so that `after` can take over their state.

    Betas, decays and learning rates may differ: they change how the state is updated, not what it consists of.
    """
    old, new = _rules(before, every_role), _rules(after, every_role)
    return {name for name, rule in new.items() if old[name] == rule}


def _rules(params: OptimizerParams, every_role: Sequence[Role]) -> dict[str, Rule]:
    hidden = hidden_weights(params, every_role) if isinstance(params, MuonParams) else set()
    return {role.parameter: ("muon",) if role.parameter in hidden else _rule(params) for role in every_role}


def _rule(params: OptimizerParams) -> Rule:
    """The rule of `params` for all weights; for Muon, the rule for all weights that are not hidden."""
    arguments: dict[str, Any] = {}
    match params:
        case AdamWParams() | MuonParams():
            name = "adamw"
        case SGDParams():
            name, arguments = "sgd", {"momentum": params.momentum}
        case _:
            name, arguments = params.name.lower(), params.arguments
    return name, *(key for key in ADDING_STATE if arguments.get(key))

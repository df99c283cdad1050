"""Parameter groups: which weights a role selector names, and the multipliers of their learning rate and weight decay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dit.errors import ConfigError
from dit.init.selectors import select
from dit.models.roles import Role
from dit.sections.optim import ParameterGroup, Selectors


@dataclass(frozen=True)
class Multipliers:
    """For one weight: the factors that multiply the optimiser's learning rate and weight decay."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0


def multipliers(groups: Sequence[ParameterGroup], every_role: Sequence[Role]) -> dict[str, Multipliers]:
    """The multipliers of every weight, by its name in the network; later groups override earlier ones.

    Raises `ConfigError`, naming the group, for a selector that names nothing, or only some rows of a weight.
    """
    found = {role.parameter: Multipliers() for role in every_role}
    for index, group in enumerate(groups):
        named = whole_weights(group.role, every_role, f"groups[{index}]")
        found |= {name: _multipliers(group, role) for name, role in named.items()}
    return found


def _multipliers(group: ParameterGroup, role: Role) -> Multipliers:
    """The multipliers that `group` gives a weight. With `base_fan_in`, weight decay grows as the learning rate falls, so that
    their product stays the same.

    Yang et al. (2022), "Tensor Programs V", table 3, Adam; microsoft/mup mup/optim.py, `MuAdam`, on matrices that grow.
    """
    width = role.fan_in / group.base_fan_in if group.base_fan_in else 1.0
    return Multipliers(group.learning_rate_multiplier / width, group.weight_decay_multiplier * width)


def whole_weights(selectors: Selectors, every_role: Sequence[Role], where: str) -> dict[str, Role]:
    """The weights that `selectors` name together, by name, each with one of its roles.

    Raises `ConfigError` that begins with `where` for a selector that names nothing, or only some rows of a weight: an optimiser
    updates a fused weight as one tensor.
    """
    parts: dict[str, set[Role]] = defaultdict(set)
    for selector in (selectors,) if isinstance(selectors, str) else selectors:
        try:
            for role in select(selector, every_role):
                parts[role.parameter].add(role)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    found = {role.parameter: role for role in every_role if role.parameter in parts}
    for part in every_role:
        if part.parameter in found and part not in parts[part.parameter]:
            raise ConfigError(
                f"{where}: role {selectors!r} names only some rows of '{part.parameter}', which an optimiser updates as one "
                f"tensor; name its other rows too, such as '{part.path}', or none of them"
            )
    return found

"""Main effects that a study declared before it ran, corrected together: the verdicts of a factorial study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dit.analysis.comparison import CONFIDENCE, FEWEST
from dit.analysis.effects import Effect, Factorial
from dit.analysis.verdicts import holm
from dit.errors import UserError


@dataclass(frozen=True)
class JudgedEffect:
    """A declared main effect with its p-value after Holm's correction over `family` declared effects."""

    effect: Effect
    p: float
    family: int

    @property
    def clear(self) -> bool:
        """Whether the effect is distinguishable from zero."""
        return self.p < 1 - CONFIDENCE

    @property
    def certainty(self) -> str:
        """The p-value in words."""
        size = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.2g}"
        return f"Holm-corrected {size} ({self.family} declared effect{'' if self.family == 1 else 's'})"


def judge_effects(found: Factorial, declared: Sequence[Mapping[str, str]]) -> list[JudgedEffect]:
    """Judge the declared effects, each named by its factor and its level, in their order.

    Raises `UserError` for an effect that the study does not have, and for fewer than three seeds.
    """
    known = {(effect.factors[0], str(effect.levels[0])): effect for effect in found.main}
    wanted = [pair for one in declared for pair in one.items()]
    if absent := [f"{factor}: {level}" for factor, level in wanted if (factor, level) not in known]:
        named = ", ".join(f"{factor}: {level}" for factor, level in known)
        raise UserError(f"no effect is called {', '.join(absent)}; expected one of {named}")
    effects = [known[pair] for pair in wanted]
    if effects and effects[0].estimate.n < FEWEST:
        raise UserError(
            f"an effect needs at least {FEWEST} seeds at which every run counts, and there are {effects[0].estimate.n}"
        )
    corrected = holm([effect.p_value for effect in effects])
    return [JudgedEffect(effect, p, len(effects)) for effect, p in zip(effects, corrected, strict=True)]

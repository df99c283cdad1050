"""The timesteps of a discrete diffusion: how noisy each is, and which of them a sampler visits.

Every list runs from the noisiest visited timestep to the cleanest. The last step of a sampler leads from the last timestep of
its list to the clean latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, pairwise, repeat

import numpy as np

SAMPLED_FROM_NOISE = 0.1
"""Largest allowed sqrt(abar) of a sampler's first timestep; at 0.1, 1 % of the variance is signal. The sampler starts from pure
noise in place of a noisy latent, so this signal is missing.

sqrt(abar) at the last timestep is 0.006 for the published DiT. For Stable Diffusion it is 0.068, the largest value in wide use;
because of it, its samples are never very dark or very bright (Lin et al. 2024, table 1 and section 3.1).
"""


def scale_betas(beta_start: float, beta_end: float, num_timesteps: int) -> tuple[float, float]:
    """First and last beta for `num_timesteps`: the betas for 1000, times 1000 / num_timesteps, so that abar_T stays about zero.

    As published (facebookresearch/DiT `get_named_beta_schedule`, "linear"). Raises `ValueError` if a beta would reach 1.
    """
    scale = 1000 / num_timesteps
    if scale * beta_end >= 1:
        raise ValueError(
            f"num_timesteps = {num_timesteps}: betas are given for 1000 timesteps and multiplied by 1000 / num_timesteps, and "
            f"the last would be {scale * beta_end:.3g}; expected more than {1000 * beta_end:g} timesteps, so that it is below 1"
        )
    return scale * beta_start, scale * beta_end


def signal_at(t: int, beta_start: float, beta_end: float, num_timesteps: int) -> float:
    """sqrt(abar_t), the weight of the clean latent in x_t at timestep `t`; the betas are given for 1000 timesteps."""
    first, last = scale_betas(beta_start, beta_end, num_timesteps)
    stride = (last - first) / (num_timesteps - 1)
    return math.sqrt(math.prod(1 - (first + stride * i) for i in range(t + 1)))


def published_ddpm(num_timesteps: int, steps: int) -> list[int]:
    """Multiples of a fractional stride, rounded; facebookresearch/DiT `space_timesteps` for a count such as "250".

    They run from 0 to num_timesteps - 1. The published code sums the stride in float64 and rounds halves to even; this function
    does the same, so that its lists have the same rounding errors.
    """
    stride = (num_timesteps - 1) / max(1, steps - 1)
    return [round(position) for position in accumulate(repeat(stride, steps - 1), initial=0.0)][::-1]


def published_ddim(num_timesteps: int, steps: int) -> list[int]:
    """Multiples of the smallest whole stride that gives `steps` timesteps; facebookresearch/DiT `space_timesteps`, "ddimN".

    Raises `ValueError` if there is no such stride.
    """
    counts = {-(-num_timesteps // stride): stride for stride in range(num_timesteps - 1, 0, -1)}
    if steps not in counts:
        below, above = max((n for n in counts if n < steps), default=None), min((n for n in counts if n > steps), default=None)
        nearest = " or ".join(str(n) for n in (below, above) if n is not None)
        raise ValueError(
            f"no whole stride gives {steps} of {num_timesteps} timesteps; expected another number of steps, such as {nearest}"
        )
    return list(range(0, num_timesteps, counts[steps]))[::-1]


def leading(num_timesteps: int, steps: int) -> list[int]:
    """Multiples of num_timesteps // steps, from 0; diffusers `leading`, Lin et al. (2024), table 2."""
    return [i * (num_timesteps // steps) for i in range(steps)][::-1]


def linspace(num_timesteps: int, steps: int) -> list[int]:
    """Evenly spaced from 0 to num_timesteps - 1, both included; diffusers `linspace`, Lin et al. (2024), table 2."""
    return np.linspace(0, num_timesteps - 1, steps).round().astype(int).tolist()[::-1]


def trailing(num_timesteps: int, steps: int) -> list[int]:
    """Evenly spaced from num_timesteps - 1 down to stride - 1; diffusers `trailing`, Lin et al. (2024), table 2.

    For some counts, such as 61 of 1000, diffusers 0.42 adds a timestep of -1; this function does not.
    """
    return (np.arange(num_timesteps, 0, -num_timesteps / steps)[:steps].round().astype(int) - 1).tolist()


def trailing_down(num_timesteps: int, steps: int) -> list[int]:
    """Like `trailing`, but computed in whole numbers and rounded down."""
    return [(steps - i) * num_timesteps // steps - 1 for i in range(steps)]


def above_zero(spacing: Callable[[int, int], list[int]]) -> Callable[[int, int], list[int]]:
    """`spacing` for one step more, without its last timestep, which is 0: diffusers does this for DPM-Solver++."""
    return lambda num_timesteps, steps: spacing(num_timesteps, steps + 1)[:-1]


_OF_DIFFUSERS = {"leading": leading, "linspace": linspace, "trailing": trailing}
SPACINGS: dict[str, dict[str, Callable[[int, int], list[int]]]] = {
    "ddpm": {"auto": published_ddpm, "published": published_ddpm, **_OF_DIFFUSERS},
    "ddim": {"auto": published_ddim, "published": published_ddim, **_OF_DIFFUSERS},
    "dpmsolver++": {
        "auto": trailing_down,
        "leading": above_zero(leading),
        "linspace": above_zero(linspace),
        "trailing": trailing,
    },
}
"""By sampler of a discrete diffusion and name of a spacing: the function (num_timesteps, steps) -> list of timesteps."""


def sampled_timesteps(scheduler: str, spacing: str, num_timesteps: int, steps: int) -> list[int]:
    """The `steps` timesteps that `scheduler` visits, in falling order. Raises `ValueError` if there are no such timesteps."""
    timesteps = SPACINGS[scheduler][spacing](num_timesteps, steps)
    if any(after >= before for before, after in pairwise(timesteps)):
        raise ValueError("some timesteps would be visited twice; expected fewer steps")
    return timesteps


def check_sampler(scheduler: str, spacing: str, steps: int, *, num_timesteps: int, beta_start: float, beta_end: float) -> None:
    """Raise `ValueError` if `scheduler` does not have this spacing or this number of steps.

    Also raise it if x_t is not almost pure noise at the first visited timestep. The samplers of flow matching have no choice of
    spacing, and their path starts from pure noise.
    """
    spacings = SPACINGS.get(scheduler, {"auto": None})
    if spacing not in spacings:
        raise ValueError(
            f"evaluate.timestep_spacing = '{spacing}' does not fit evaluate.scheduler = '{scheduler}'; "
            f"expected {' or '.join(spacings)}"
        )
    if scheduler not in SPACINGS:
        return
    where = f"evaluate.steps = {steps} with evaluate.scheduler = '{scheduler}' and evaluate.timestep_spacing = '{spacing}'"
    try:
        first = sampled_timesteps(scheduler, spacing, num_timesteps, steps)[0]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    signal = signal_at(first, beta_start, beta_end, num_timesteps)
    if signal > SAMPLED_FROM_NOISE:
        raise ValueError(
            f"{where}: sampling would start from pure noise at timestep {first}, where sqrt(abar) is {signal:.2g}; expected at "
            f"most {SAMPLED_FROM_NOISE}: take more steps, evaluate.timestep_spacing 'trailing', or a larger diffusion.beta_end"
        )

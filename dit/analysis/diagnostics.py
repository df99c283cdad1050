"""What each role of the network does at one optimiser step, and how noisy the step's gradient is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit.analysis.symmetry import count_distinct
from dit.models import Role, backbone_of

HEAD = "final.projection.weight"
GATE = ".gate.weight"


@dataclass(frozen=True)
class RoleState:
    """One role at one step. Root mean squares are over the role's entries; what does not apply to a role is None.

    - `update_ratio`: RMS of the update over that of the weights, None where all weights are zero.
    - `distinct_units`: of the hidden units on `block[i].mlp_in.weight`, of the heads on `block[i].attn_out.weight`, of the
      head's rows on `final.projection.weight`; None where a weight is not finite.
    - `effective_rank`: of the weights of the head and of each gate; None where they are all zero or not finite.
    - `gate_rms`: of the gate itself, over the batch and its features, on `block[i].modulation.attn|mlp.gate.weight`.
    """

    role: str
    gradient_rms: float
    weight_rms: float
    update_ratio: float | None
    zero_gradient_fraction: float
    distinct_units: int | None
    effective_rank: float | None
    gate_rms: float | None


@torch.no_grad()
def diagnose(model: nn.Module, update: Callable[[], None], timesteps: Tensor, labels: Tensor) -> list[RoleState]:
    """Describe every role at this step, from the gradients that `model` holds, and call `update` to see what it changes.

    `timesteps` (B,) and `labels` (B,) are those of the step's batch. The host waits for the device once, at the end.
    """
    backbone = backbone_of(model)
    found = backbone.roles(model)
    parameters = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    held = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad  # None where nothing uses the weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    weights, gradients = _by_role(found, parameters), _by_role(found, held)
    measured = [torch._foreach_norm(gradients), torch._foreach_norm(gradients, 0), torch._foreach_norm(weights)]
    by_path = {role.path: weight for role, weight in zip(found, weights, strict=True)}
    distinct = {path: count_distinct(units) for path, units in backbone.units(model).items()}
    gates = {path: _rms(gate) for path, gate in backbone.gates(model, timesteps, labels).items()}
    special = [distinct, _effective_ranks(by_path), gates]
    changes = {name: weight.clone() for name, weight in parameters.items()}
    update()
    torch._foreach_sub_(list(changes.values()), list(parameters.values()))
    measured.append(torch._foreach_norm(_by_role(found, changes)))
    scalars = [value.float() for values in (*measured, *(values.values() for values in special)) for value in values]
    read = iter(torch.stack(scalars).tolist())
    columns = [[next(read) for _ in found] for _ in measured]
    units, ranks, openness = ({path: next(read) for path in values} for values in special)
    states = []
    for role, size, *norms in zip(found, (weight.numel() for weight in weights), *columns, strict=True):
        gradient, nonzero, weight, change = norms
        states.append(
            RoleState(
                role=role.path,
                gradient_rms=gradient / math.sqrt(size),
                weight_rms=weight / math.sqrt(size),
                update_ratio=change / weight if weight else None,
                zero_gradient_fraction=1 - nonzero / size,
                distinct_units=None if (count := _finite(units.get(role.path))) is None else int(count),
                effective_rank=_finite(ranks.get(role.path)),
                gate_rms=openness.get(role.path),
            )
        )
    return states


def _by_role(found: list[Role], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [role.of(tensors[role.parameter]) for role in found]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _effective_ranks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    special = (path for path, weight in weights.items() if (path == HEAD or path.endswith(GATE)) and weight.dim() == 2)
    return {path: effective_rank(weights[path]) for path in special}


def effective_rank(weight: Tensor) -> Tensor:
    """(tr A)^2 / tr(A^2) of A = W W^T, for a matrix W: a scalar from 1 to its rank, NaN where all its entries are zero.

    The participation ratio of the eigenvalues of A, the squared singular values of W: the effective rank R_0 of Bartlett et al.
    (2020), "Benign overfitting in linear regression". It needs no decomposition: with W scaled to tr A = 1 it is 1 / |A|^2.
    """
    scaled = weight.float() / weight.float().norm()
    return 1 / (scaled @ scaled.T).square().sum()


def _rms(gate: Tensor) -> Tensor:
    return gate.float().norm() / math.sqrt(gate.numel())


@dataclass(frozen=True)
class GradientNoise:
    """How noisy the gradient of one step is; McCandlish et al. (2018), "An empirical model of large-batch training".

    `squared_norm` and `covariance_trace` are unbiased estimates, which may be negative, of |G|^2 and tr(Sigma): G is the
    expected gradient and Sigma the covariance of that of one sample. `batch_norm` and `part_norm` are the norms of the gradient
    over the whole batch and over a part of it, from which they come.
    """

    squared_norm: float
    covariance_trace: float
    batch_norm: float
    part_norm: float


def gradient_noise(batch_norm: float, part_norm: float, batch_size: int, part_size: int) -> GradientNoise:
    """Both estimates from the gradient's norm over `batch_size` samples and over `part_size`, fewer, of them.

    A mean over B samples has E|g|^2 = |G|^2 + tr(Sigma) / B, which two sizes solve; appendix A.1 of the paper. The part may
    belong to the batch, as expectations add up all the same.
    """
    whole, part = batch_norm * batch_norm, part_norm * part_norm
    return GradientNoise(
        squared_norm=(batch_size * whole - part_size * part) / (batch_size - part_size),
        covariance_trace=(part - whole) / (1 / part_size - 1 / batch_size),
        batch_norm=batch_norm,
        part_norm=part_norm,
    )


def noise_scale(noise: Iterable[GradientNoise]) -> float | None:
    """The simple noise scale tr(Sigma) / |G|^2, in samples, over several steps: about the largest batch that still pays.

    A ratio of averages, as each step's own ratio is biased; appendix A.1 of the paper. Steps that are not finite are left out.
    None where the averages do not determine it, as too few steps leave an estimate of |G|^2 or of tr(Sigma) below zero.
    """
    finite = [one for one in noise if math.isfinite(one.squared_norm) and math.isfinite(one.covariance_trace)]
    squared_norm = math.fsum(one.squared_norm for one in finite)
    covariance_trace = math.fsum(one.covariance_trace for one in finite)
    return covariance_trace / squared_norm if squared_norm > 0 and covariance_trace >= 0 else None

"""What each role of the network does at one optimiser step, and how noisy the step's gradient is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dit.analysis.symmetry import count_distinct
from dit.models import backbone_of

HEAD = "final.projection.weight"
GATE = ".gate.weight"


class RoleState(NamedTuple):
    """One role at one step. Root mean squares (RMS) are over the role's entries; a field that does not apply is None.

    - `update_ratio`: RMS of the update divided by RMS of the weights; None if all weights are zero.
    - `distinct_units`: how many hidden units differ (role `block[i].mlp_in.weight`), how many attention heads differ
      (`block[i].attn_out.weight`), or how many output rows differ (`final.projection.weight`); None if a weight is not finite.
    - `effective_rank`: effective rank of the weights of the output projection or of a gate; None if all are zero or one is not
      finite.
    - `gate_rms`: RMS of the gate's values over batch and features, for the roles `block[i].modulation.attn|mlp.gate.weight`.
    """

    role: str
    gradient_rms: float
    weight_rms: float
    update_ratio: float | None
    zero_gradient_fraction: float
    distinct_units: int | None
    effective_rank: float | None
    gate_rms: float | None


class RoleProbe:
    """Reads the state of every role of `model` once a step's gradients are known, and then how far the step moved the role.

    All readings stay on the device and make the same calls every time, so that a CUDA graph can capture them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.backbone = backbone_of(model)
        self.roles = self.backbone.roles(model)
        self.weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
        self.sizes = [role.count * math.prod(role.shape[1:]) for role in self.roles]
        self._special: list[list[str]] = []
        self._previous: list[Tensor] = []

    @torch.no_grad()
    def norms(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Three numbers for each role, before the update: norm of its gradient, nonzero entries of its gradient, its own norm.

        `gradients` holds one gradient for each of `weights`, in the same order; None for a weight that nothing uses.
        """
        pairs = zip(self.weights.items(), gradients, strict=True)
        held = {name: torch.zeros_like(weight) if gradient is None else gradient for (name, weight), gradient in pairs}
        signs = dict(zip(held, torch._foreach_sign(list(held.values())), strict=True))
        norms = [torch._foreach_norm(self._by_role(held)), torch._foreach_norm(self._by_role(signs), 1)]
        self._previous = [torch.empty_like(weight) for weight in self.weights.values()]
        torch._foreach_copy_(self._previous, list(self.weights.values()))
        return _vector([*norms, torch._foreach_norm(self._by_role(self.weights))])

    @torch.no_grad()
    def symmetry(self, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Before the update: distinct units, effective ranks and gates of the roles that have them, one after the other.

        `timesteps` (B,) and `labels` (B,) belong to the step's batch.
        """
        by_path = {role.path: weight for role, weight in zip(self.roles, self._by_role(self.weights), strict=True)}
        distinct = {path: count_distinct(units) for path, units in self.backbone.units(self.model).items()}
        gates = {path: _rms(gate) for path, gate in self.backbone.gates(self.model, timesteps, labels).items()}
        special = [distinct, _effective_ranks(by_path), gates]
        self._special = [list(values) for values in special]
        scalars = [list(values.values()) for values in special]
        return _vector(scalars) if any(scalars) else torch.empty(0, device=timesteps.device)  # a network without such roles

    @torch.no_grad()
    def changes(self) -> Tensor:
        """The norm of each role's change since the last call of `norms`."""
        changes = torch._foreach_sub(self._previous, list(self.weights.values()))
        return _vector([torch._foreach_norm(self._by_role(dict(zip(self.weights, changes, strict=True))))])

    def forget(self) -> None:
        """Free the copy of the weights that `norms` made."""
        self._previous = []

    def states(self, read: Sequence[float]) -> list[RoleState]:
        """The state of every role, from the concatenated numbers that `norms`, `symmetry` and `changes` returned."""
        values = iter(read)
        gradients, nonzero, weights = ([next(values) for _ in self.roles] for _ in range(3))
        units, ranks, openness = ({path: next(values) for path in paths} for paths in self._special)
        columns = zip(self.roles, self.sizes, gradients, nonzero, weights, values, strict=True)
        return [
            RoleState(
                role=role.path,
                gradient_rms=gradient / math.sqrt(size),
                weight_rms=weight / math.sqrt(size),
                update_ratio=change / weight if weight else None,
                zero_gradient_fraction=1 - count / size if math.isfinite(gradient) else 0.0,
                distinct_units=None if (number := _finite(units.get(role.path))) is None else int(number),
                effective_rank=_finite(ranks.get(role.path)),
                gate_rms=openness.get(role.path),
            )
            for role, size, gradient, count, weight, change in columns
        ]

    def _by_role(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [role.of(tensors[role.parameter]) for role in self.roles]


def _vector(columns: Iterable[Sequence[Tensor]]) -> Tensor:
    """All scalars of the columns, one column after the other."""
    return torch.stack([value.float() for values in columns for value in values])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _effective_ranks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    special = (path for path, weight in weights.items() if (path == HEAD or path.endswith(GATE)) and weight.dim() == 2)
    return {path: effective_rank(weights[path]) for path in special}


def effective_rank(weight: Tensor) -> Tensor:
    """(tr A)^2 / tr(A^2) of A = W W^T, for a matrix W: a scalar from 1 to the rank of W; NaN if all entries of W are zero.

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

    `squared_norm` and `covariance_trace` are unbiased estimates of |G|^2 and tr(Sigma), and may be negative: G is the expected
    gradient, and Sigma the covariance of the gradient of one sample. Both estimates come from `batch_norm` and `part_norm`, the
    norms of the gradient over the whole batch and over a part of it.
    """

    squared_norm: float
    covariance_trace: float
    batch_norm: float
    part_norm: float


def gradient_noise(batch_norm: float, part_norm: float, batch_size: int, part_size: int) -> GradientNoise:
    """Estimates |G|^2 and tr(Sigma) from the gradient's norm over `batch_size` samples and over `part_size` of these samples.

    A mean over B samples has E|g|^2 = |G|^2 + tr(Sigma) / B; two values of B give two equations for the two unknowns (appendix
    A.1 of the paper). The part may belong to the batch, because the equations are about expectations.
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

    It is a ratio of averages, because the ratio at each step is biased (appendix A.1 of the paper). Steps with values that are
    not finite are left out. None if the average estimate of |G|^2 or of tr(Sigma) is below zero, as it may be for few steps.
    """
    finite = [one for one in noise if math.isfinite(one.squared_norm) and math.isfinite(one.covariance_trace)]
    squared_norm = math.fsum(one.squared_norm for one in finite)
    covariance_trace = math.fsum(one.covariance_trace for one in finite)
    return covariance_trace / squared_norm if squared_norm > 0 and covariance_trace >= 0 else None

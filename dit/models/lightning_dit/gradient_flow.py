"""One forward and backward pass of a LightningDiT on the patterns of its weights: the parts that differ from a DiT."""

from __future__ import annotations

from collections.abc import Mapping

from dit.models.dit.gradient_flow import Flow
from dit.models.gradient_flow import (
    NOTHING,
    ONE,
    ZERO,
    Kind,
    Pattern,
    Vector,
    activation,
    linear,
    slope,
    total,
)
from dit.models.lightning_dit.layers import Variant
from dit.models.lightning_dit.network import LightningDiT
from dit.models.lightning_dit.roles import SWIGLU


def gradient_flow(model: LightningDiT, weights: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The pattern of every role's gradient, from the patterns of the weights."""
    return LightningFlow(weights, model).gradients


class LightningFlow(Flow):
    """The `Flow` of a LightningDiT, with its choices."""

    def __init__(self, weights: Mapping[str, Pattern], model: LightningDiT) -> None:
        self.variant: Variant = model.variant
        self.rotary = model.variant.use_rope
        super().__init__(weights, model.depth, model.num_heads, (model.latent_size // model.patch_size) ** 2)

    def _hidden(self, block: str, x: Vector) -> Vector:
        """SiLU(first half of mlp_in(x)) * second half with SwiGLU; otherwise as in DiT."""
        if not self.variant.use_swiglu:
            return super()._hidden(block, x)
        first, second = (self._linear(f"{block}.{half}", x) for half in SWIGLU)
        return activation(first) * second

    def _hidden_backward(self, block: str, x: Vector, delta: Vector) -> Vector:
        if not self.variant.use_swiglu:
            return super()._hidden_backward(block, x, delta)
        first, second = (self._linear(f"{block}.{half}", x) for half in SWIGLU)
        to_first, to_second = delta * second * slope(first), delta * activation(first)
        pairs = zip(SWIGLU, (to_first, to_second), strict=True)
        received = [self._receive(f"{block}.{half}", part, x) for half, part in pairs]
        return received[0] + received[1]

    def _norm(self, norm: str) -> Vector:
        """norm(x), where x is the residual stream. RMSNorm subtracts no mean, and multiplies by its weight."""
        return self._root_mean_square() * self._weight(norm) if self.variant.use_rmsnorm else super()._norm(norm)

    def _norm_backward(self, norm: str, delta: Vector) -> Vector:
        if not self.variant.use_rmsnorm:
            return super()._norm_backward(norm, delta)
        self.gradients[f"{norm}.weight"] = total(delta * self._root_mean_square())
        return self._root_mean_square() if delta * self._weight(norm) else NOTHING

    def _root_mean_square(self) -> Vector:
        """x / rms(x), where x is the residual stream."""
        return Vector(shared="generic") if self.one_token else Vector(own="generic")

    def _weight(self, norm: str) -> Vector:
        return linear(ONE, self.weights[f"{norm}.weight"])

    def _sum_vanishes(self, key: Vector) -> bool:
        """The sum vanishes as in DiT, except with rotary positions, which differ between tokens, and except with a norm of keys
        whose factors differ between tokens.
        """
        same = key.own == "zero" or (key.own == "uniform" and not self.variant.use_rmsnorm)
        return not self.rotary and (same or not self.variant.use_qknorm)

    def _head_norm(self, norm: str, x: Vector) -> Vector:
        """The norm of each head: LayerNorm with weight and bias, or RMSNorm with a weight."""
        if not self.variant.use_qknorm:
            return x
        normed = self._head_normed(x) * self._weight(norm)
        return normed if self.variant.use_rmsnorm else normed + linear(ONE, self.weights[f"{norm}.bias"])

    def _head_norm_backward(self, norm: str, x: Vector, delta: Vector) -> Vector:
        if not self.variant.use_qknorm:
            return delta
        normed = self._head_normed(x)
        shared_is_seen = self.rotary or not norm.endswith(".key")  # softmax ignores what all keys share
        self.gradients[f"{norm}.weight"] = total(delta * (normed if shared_is_seen else Vector(own=normed.own)))
        if not self.variant.use_rmsnorm:
            self.gradients[f"{norm}.bias"] = total(delta) if shared_is_seen else ZERO
        inner = delta * self._weight(norm)
        if self.variant.use_rmsnorm:
            kept = not x or x.kind == inner.kind == "uniform"
            return inner if kept or not inner else Vector(own="generic")
        return Vector(own="centred") if {inner.own, inner.shared} - {"zero", "uniform"} else NOTHING

    def _head_normed(self, x: Vector) -> Vector:
        """Queries or keys, normalised in each head. A norm is not linear, so it mixes the own and shared parts of tokens."""
        if self.variant.use_rmsnorm:
            kind: Kind = x.kind if x.kind in ("zero", "uniform") else "generic"
            return Vector(own=kind) if x.own != "zero" else Vector(shared=kind)
        if x.own not in ("zero", "uniform"):
            return Vector(own="centred")
        return Vector(shared="zero" if x.shared in ("zero", "uniform") else "centred")

    def _modulate(self, role: str, norm: str) -> Vector:
        if self._has_shift(role):
            return super()._modulate(role, norm)
        return self._norm(norm) * self._scale(role)

    def _modulation_receives(self, role: str, delta: Vector) -> None:
        if role.endswith(".shift") and not self._has_shift(role.removesuffix(".shift")):
            return
        super()._modulation_receives(role, delta)

    def _has_shift(self, role: str) -> bool:
        return f"{role}.shift.weight" in self.weights

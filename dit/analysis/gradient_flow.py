"""Which weights of a DiT receive a gradient: the chain rule read on what is known of each weight matrix, not on numbers.

A product with a zero factor passes nothing. Three more products vanish, whatever the numbers: a matrix with equal columns, or
the transpose of one with equal rows, times a vector that sums to zero; and 1 + scale where the scale is -1. Vectors that sum to
zero come from layer norm: forwards, as it subtracts the mean; backwards, as it does not see one. And softmax does not see what
all its logits share. All other sums are taken not to cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dit.init.rules import Pattern

Kind = Literal["zero", "uniform", "centred", "generic"]
"""A vector over features that is zero, has equal entries, has entries that sum to zero, or is none of these."""


@dataclass(frozen=True)
class Vector:
    """What is known of the vectors at all tokens of a sample: each is one part of its own plus one that all tokens share."""

    own: Kind = "zero"
    shared: Kind = "zero"

    @property
    def kind(self) -> Kind:
        """That of the whole."""
        return _sum(self.own, self.shared)

    def __bool__(self) -> bool:
        return self.kind != "zero"

    def __add__(self, other: Vector) -> Vector:
        return Vector(_sum(self.own, other.own), _sum(self.shared, other.shared))

    def __mul__(self, factor: Vector) -> Vector:
        """Elementwise."""
        own = _sum(_product(self.own, factor.kind), _product(self.shared, factor.own))
        return Vector(own, _product(self.shared, factor.shared))


NOTHING = Vector()
ANYTHING = Vector(own="generic")
PER_SAMPLE = Vector(shared="generic")


def _sum(one: Kind, other: Kind) -> Kind:
    if "zero" in (one, other):
        return other if one == "zero" else one
    return one if one == other else "generic"


def _product(one: Kind, other: Kind) -> Kind:
    if "zero" in (one, other):
        return "zero"
    if "uniform" in (one, other):
        return other if one == "uniform" else one
    return "generic"


def activation(x: Vector) -> Vector:
    """SiLU or GELU: zero at zero, and the same function of every feature."""
    kind: Kind = x.kind if x.kind in ("zero", "uniform") else "generic"
    return Vector(own=kind) if x.own != "zero" else Vector(shared=kind)


def slope(x: Vector) -> Vector:
    """The derivative of `activation` at `x`, which is nowhere zero for all features."""
    kind: Kind = "uniform" if x.kind in ("zero", "uniform") else "generic"
    return Vector(own=kind) if x.own != "zero" else Vector(shared=kind)


def linear(x: Vector, weight: Pattern, bias: Pattern) -> Vector:
    """`weight @ x + bias`."""
    constant: Kind = bias if bias in ("zero", "generic") else "uniform"
    return _through(x, weight, "equal_columns", "equal_rows") + Vector(shared=constant)


def transposed(delta: Vector, weight: Pattern) -> Vector:
    """`weight.T @ delta`: the gradient of a linear layer's input, from that of its output."""
    return _through(delta, weight, "equal_rows", "equal_columns")


def _through(x: Vector, weight: Pattern, summing: Pattern, repeating: Pattern) -> Vector:
    """A matrix that is `summing` sees only the sum of a vector; what comes of one that is `repeating` is uniform."""

    def part(kind: Kind) -> Kind:
        if "zero" in (kind, weight) or (kind == "centred" and _has(weight, summing)):
            return "zero"
        return "uniform" if _has(weight, repeating) else "generic"

    return Vector(part(x.own), part(x.shared))


def _has(weight: Pattern, pattern: Pattern) -> bool:
    """A constant matrix has both equal rows and equal columns."""
    return weight in (pattern, "constant", "minus_one")


def outer(delta: Vector, x: Vector) -> Pattern:
    """The gradient of a weight matrix: the sum over tokens of `delta` times `x` transposed."""
    if not (delta and x):
        return "zero"
    rows, columns = delta.kind == "uniform", x.kind == "uniform"
    return "constant" if rows and columns else "equal_rows" if rows else "equal_columns" if columns else "generic"


def total(delta: Vector) -> Pattern:
    """The gradient of a bias: the sum over tokens of `delta`."""
    return "zero" if not delta else "constant" if delta.kind == "uniform" else "generic"


def updated(weight: Pattern, gradient: Pattern) -> Pattern:
    """A weight after an optimiser step, elementwise such as those of SGD and Adam, along `gradient`."""
    if gradient in ("zero", weight):
        return weight
    if weight == "zero":
        return gradient
    shared = [pattern for pattern in ("equal_rows", "equal_columns") if _has(weight, pattern) and _has(gradient, pattern)]
    return "constant" if len(shared) == 2 else shared[0] if shared else "generic"  # type: ignore[return-value]


class Flow:
    """One forward and backward pass of a DiT of `depth` blocks on `tokens` tokens; `gradients` is what each role receives.

    Inputs, positions, and the loss gradient of the output are generic; tokens and their norms are never zero.
    """

    def __init__(self, weights: Mapping[str, Pattern], depth: int, tokens: int) -> None:
        self.weights = weights
        self.gradients: dict[str, Pattern] = dict.fromkeys(weights, "zero")
        self.normed = Vector(shared="centred") if tokens == 1 else Vector(own="centred")
        self.conditioning_gradient = NOTHING
        self._embed_conditioning()
        stream = self._final_layer()
        for index in reversed(range(depth)):
            self._mlp(f"block[{index}]", stream)
            self._attention(f"block[{index}]", stream)
        self._receive("patch_embed", stream, ANYTHING)
        self._conditioning_backward()

    def _embed_conditioning(self) -> None:
        """SiLU(timestep_mlp.out(SiLU(timestep_mlp.in(features))) + label); attributes are what comes before each SiLU."""
        self.timestep_hidden = self._linear("timestep_mlp.in", PER_SAMPLE)
        table = self.weights["label_table.weight"]
        label: Kind = "zero" if table == "zero" else "uniform" if _has(table, "equal_columns") else "generic"
        self.embedding = self._linear("timestep_mlp.out", activation(self.timestep_hidden)) + Vector(shared=label)
        self.conditioning = activation(self.embedding)

    def _final_layer(self) -> Vector:
        """projection(norm(x) * (1 + scale) + shift); the gradient of the residual stream x."""
        modulated = self._modulate("final.modulation")
        return self._modulate_backward("final.modulation", self._receive("final.projection", ANYTHING, modulated))

    def _mlp(self, block: str, stream: Vector) -> None:
        """x + gate * mlp_out(GELU(mlp_in(norm(x) * (1 + scale) + shift)))."""
        role = f"{block}.modulation.mlp"
        modulated = self._modulate(role)
        hidden = self._linear(f"{block}.mlp_in", modulated)
        active = activation(hidden)
        branch = self._gate(f"{role}.gate", stream, self._linear(f"{block}.mlp_out", active))
        hidden_gradient = self._receive(f"{block}.mlp_out", branch, active) * slope(hidden)
        self._modulate_backward(role, self._receive(f"{block}.mlp_in", hidden_gradient, modulated))

    def _attention(self, block: str, stream: Vector) -> None:
        """x + gate * attn_out(softmax(query @ key) @ value), of h = norm(x) * (1 + scale) + shift.

        Softmax weights sum to one, so that logits receive no gradient where all values are the same, nor queries where all keys
        are, and a shift that all keys share, such as their bias, never does.
        """
        role = f"{block}.modulation.attn"
        modulated = self._modulate(role)
        query, key, value = (self._linear(f"{block}.qkv.{name}", modulated) for name in ("query", "key", "value"))
        mixed = Vector("generic", value.shared) if value.own != "zero" else value
        branch = self._gate(f"{role}.gate", stream, self._linear(f"{block}.attn_out", mixed))
        mixed_gradient = self._receive(f"{block}.attn_out", branch, mixed)
        logits = mixed_gradient and value.own != "zero"
        to_query = ANYTHING if logits and key.own != "zero" else NOTHING
        to_key = ANYTHING if logits and query else NOTHING
        to_value = mixed_gradient if self.normed.own == "zero" or not mixed_gradient else ANYTHING
        received = [
            self._receive(f"{block}.qkv.{name}", delta, modulated)
            for name, delta in (("query", to_query), ("key", to_key), ("value", to_value))
        ]
        self.gradients[f"{block}.qkv.key.bias"] = "zero"
        self._modulate_backward(role, received[0] + received[1] + received[2])

    def _conditioning_backward(self) -> None:
        delta = self.conditioning_gradient * slope(self.embedding)
        self.gradients["label_table.weight"] = outer(PER_SAMPLE, delta)  # a row of the table for each label
        hidden = self._receive("timestep_mlp.out", delta, activation(self.timestep_hidden))
        self._receive("timestep_mlp.in", hidden * slope(self.timestep_hidden), PER_SAMPLE)

    def _linear(self, layer: str, x: Vector) -> Vector:
        return linear(x, self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"])

    def _receive(self, layer: str, delta: Vector, x: Vector) -> Vector:
        """Note what a linear layer with input `x` receives from its output's gradient; that of its input."""
        self.gradients[f"{layer}.weight"] = outer(delta, x)
        self.gradients[f"{layer}.bias"] = total(delta)
        return transposed(delta, self.weights[f"{layer}.weight"])

    def _scale(self, role: str) -> Vector:
        """1 + scale."""
        weight, bias = (self.weights[f"{role}.scale.{kind}"] for kind in ("weight", "bias"))
        varying = linear(self.conditioning, weight, "zero")
        if not varying and bias == "minus_one":
            return NOTHING
        return Vector(shared="uniform") + varying + linear(NOTHING, weight, bias)

    def _modulate(self, role: str) -> Vector:
        """norm(x) * (1 + scale) + shift."""
        return self.normed * self._scale(role) + self._linear(f"{role}.shift", self.conditioning)

    def _modulate_backward(self, role: str, delta: Vector) -> Vector:
        """Note what shift and scale receive; the gradient of x, of which the norm removes what all features share."""
        self._modulation_receives(f"{role}.shift", delta)
        self._modulation_receives(f"{role}.scale", delta * self.normed)
        inner = delta * self._scale(role)
        return self.normed if {inner.own, inner.shared} - {"zero", "uniform"} else NOTHING

    def _gate(self, role: str, stream: Vector, branch: Vector) -> Vector:
        """Note what the gate of `stream + gate * branch` receives; the gradient of the branch."""
        self._modulation_receives(role, stream * branch)
        return stream * self._linear(role, self.conditioning)

    def _modulation_receives(self, role: str, delta: Vector) -> None:
        received = self._receive(role, Vector(shared=delta.kind), self.conditioning)
        self.conditioning_gradient = self.conditioning_gradient + received

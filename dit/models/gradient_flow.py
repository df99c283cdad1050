"""Which weights receive a gradient: the chain rule read on what is known of each weight matrix, not on numbers.

A product with a zero factor passes nothing. Three more products vanish, whatever the numbers: a matrix with equal columns, or
the transpose of one with equal rows, times a vector that sums to zero; and 1 + scale where the scale is -1. Vectors that sum to
zero come from layer norm: forwards, as it subtracts the mean; backwards, as it does not see one. And softmax does not see what
all its logits share. All other sums are taken not to cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Pattern = Literal["zero", "constant", "minus_one", "equal_rows", "equal_columns", "generic"]
"""What is known of a role's weights.

All entries are zero, or one other number (`constant`; `minus_one` for that number, in a bias), or all rows, or all columns, of
a matrix are equal; `generic`: none of these.
"""


def pattern_of(weights: Tensor) -> Pattern:
    """The pattern of a matrix (out, in) or a vector that is there."""
    first = weights.flatten()[0]
    if (weights == first).all():
        return "zero" if first == 0 else "minus_one" if weights.dim() == 1 and first == -1 else "constant"
    if weights.dim() == 1:
        return "generic"
    if (weights == weights[:1]).all():
        return "equal_rows"
    return "equal_columns" if (weights == weights[:, :1]).all() else "generic"


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
        if "zero" in (kind, weight) or (kind == "centred" and has(weight, summing)):
            return "zero"
        return "uniform" if has(weight, repeating) else "generic"

    return Vector(part(x.own), part(x.shared))


def has(weight: Pattern, pattern: Pattern) -> bool:
    """Whether a matrix has a pattern: a constant matrix has both equal rows and equal columns."""
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


def orthogonalised(parts: Sequence[Pattern]) -> list[Pattern]:
    """The update of Muon from a momentum matrix X, both as the row parts that have roles of their own.

    It is a polynomial X (a + b X'X + c (X'X)^2), several times over, whose factor is positive definite for Muon's a, b, c, as
    b^2 < 4ac. So zero rows stay zero, others do not become zero, and equal rows stay equal, also those of one part. It is also
    (a + b XX' + c (XX')^2) X, so that equal columns of the whole matrix stay equal; those of one part alone do not.
    """
    if all(part == "zero" or has(part, "equal_columns") for part in parts):
        return list(parts)
    mixed: dict[Pattern, Pattern] = {"equal_columns": "generic", "constant": "equal_rows"}
    return [mixed.get(part, part) for part in parts]


def updated(weight: Pattern, gradient: Pattern) -> Pattern:
    """A weight after an optimiser step, elementwise such as those of SGD and Adam, along `gradient`."""
    if gradient in ("zero", weight):
        return weight
    if weight == "zero":
        return gradient
    shared = [pattern for pattern in ("equal_rows", "equal_columns") if has(weight, pattern) and has(gradient, pattern)]
    return "constant" if len(shared) == 2 else shared[0] if shared else "generic"  # type: ignore[return-value]

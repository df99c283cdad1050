"""Which weights receive a gradient. The chain rule is applied to patterns of the weight matrices, not to their numbers.

A product with a zero factor is zero. Some other products are zero for any numbers, if all entries of a vector are equal (the
vector is *uniform*) or sum to zero (it is *centred*). A matrix with equal columns times a centred vector is zero, and so is a
matrix whose rows each sum to zero times a uniform vector; 1 + scale is zero if the scale is -1. Layer norm makes vectors
centred: the forward pass subtracts the mean, and so the backward pass removes the mean of the gradient. A matrix whose rows
have equal sums keeps a uniform vector uniform. A matrix whose columns have equal sums keeps a centred vector centred. An
identity matrix does both. Softmax does not change if a constant is added to all its logits. All other sums are assumed not to
cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Kind = Literal["zero", "uniform", "centred", "generic"]
"""A vector over features that is zero, has equal entries, has entries that sum to zero, or is none of these."""

Sums = Literal["zero", "equal", "any"]

Updates = Literal["elementwise", "linear"]
"""How an optimiser turns gradients into steps: entry by entry, such as Adam, or by a linear map of gradients, such as SGD."""

ROUNDING = 1e-14
"""Two sums, in float64, count as equal if they differ by at most this fraction of the sum of absolute values."""


@dataclass(frozen=True)
class Pattern:
    """What is known about a role's weights, as a matrix (out, in); a vector is a matrix with one column."""

    zero: bool = False
    minus_one: bool = False
    """All entries are -1."""
    equal_rows: bool = False
    equal_columns: bool = False
    row_sums: Sums = "any"
    column_sums: Sums = "any"

    @property
    def transposed(self) -> Pattern:
        """The pattern of the transposed matrix."""
        return Pattern(self.zero, self.minus_one, self.equal_columns, self.equal_rows, self.column_sums, self.row_sums)


ZERO = Pattern(zero=True, equal_rows=True, equal_columns=True, row_sums="zero", column_sums="zero")


def pattern_of(weights: Tensor) -> Pattern:
    """The pattern of the given weights, a matrix (out, in) or a vector."""
    matrix = weights.double().reshape(len(weights), -1)
    first = matrix[0, 0]
    if (matrix == first).all() and first == 0:
        return ZERO
    return Pattern(
        minus_one=bool((matrix == -1).all()),
        equal_rows=bool((matrix == matrix[:1]).all()),
        equal_columns=bool((matrix == matrix[:, :1]).all()),
        row_sums=_sums(matrix),
        column_sums=_sums(matrix.T),
    )


def _sums(matrix: Tensor) -> Sums:
    sums, tolerance = matrix.sum(1), ROUNDING * matrix.abs().sum(1).max()
    if (sums.abs() <= tolerance).all():
        return "zero"
    return "equal" if ((sums - sums[0]).abs() <= tolerance).all() else "any"


@dataclass(frozen=True)
class Vector:
    """What is known about the vectors at all tokens of a sample. Each is the sum of the token's `own` part and a `shared` part,
    which is the same for all tokens.
    """

    own: Kind = "zero"
    shared: Kind = "zero"

    @property
    def kind(self) -> Kind:
        """The kind of the sum of both parts."""
        return _sum(self.own, self.shared)

    @property
    def averaged(self) -> Vector:
        """The mean over tokens, which is the same for all tokens."""
        return Vector(shared=self.kind)

    def __bool__(self) -> bool:
        return self.kind != "zero"

    def __add__(self, other: Vector) -> Vector:
        return Vector(_sum(self.own, other.own), _sum(self.shared, other.shared))

    def __mul__(self, factor: Vector) -> Vector:
        """The elementwise product."""
        own = _sum(_product(self.own, factor.kind), _product(self.shared, factor.own))
        return Vector(own, _product(self.shared, factor.shared))


NOTHING = Vector()
ANYTHING = Vector(own="generic")
PER_SAMPLE = Vector(shared="generic")
ONE = Vector(shared="uniform")


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
    """SiLU or GELU of `x`: both are zero at zero, and are the same function for every feature."""
    kind: Kind = x.kind if x.kind in ("zero", "uniform") else "generic"
    return Vector(own=kind) if x.own != "zero" else Vector(shared=kind)


def slope(x: Vector) -> Vector:
    """The derivative of `activation` at `x`, which is never zero for all features at once."""
    kind: Kind = "uniform" if x.kind in ("zero", "uniform") else "generic"
    return Vector(own=kind) if x.own != "zero" else Vector(shared=kind)


def linear(x: Vector, weight: Pattern, bias: Pattern = ZERO) -> Vector:
    """`weight @ x + bias`."""
    return Vector(_through(x.own, weight), _through(x.shared, weight)) + Vector(shared=_through("uniform", bias))


def transposed(delta: Vector, weight: Pattern) -> Vector:
    """`weight.T @ delta`: the gradient of a linear layer's input, from the gradient `delta` of its output."""
    return linear(delta, weight.transposed)


def _through(x: Kind, weight: Pattern) -> Kind:
    """The kind of `weight @ x`. With equal columns it depends only on the sum of x; with equal rows it is uniform."""
    sees_nothing = (x == "centred" and weight.equal_columns) or (x == "uniform" and weight.row_sums == "zero")
    if x == "zero" or weight.zero or sees_nothing:
        return "zero"
    if weight.equal_rows or (x == "uniform" and weight.row_sums == "equal"):
        return "uniform"
    if weight.column_sums == "zero" or (x == "centred" and weight.column_sums == "equal"):
        return "centred"
    return "generic"


def outer(delta: Vector, x: Vector) -> Pattern:
    """The gradient of a weight matrix: the sum over tokens of `delta` times `x` transposed."""
    if not (delta and x):
        return ZERO
    rows, columns = delta.kind == "uniform", x.kind == "uniform"
    return Pattern(
        equal_rows=rows,
        equal_columns=columns,
        row_sums="zero" if x.kind == "centred" else "equal" if rows else "any",
        column_sums="zero" if delta.kind == "centred" else "equal" if columns else "any",
    )


def total(delta: Vector) -> Pattern:
    """The gradient of a bias: the sum over tokens of `delta`."""
    return outer(delta, ONE)


def orthogonalised(parts: Sequence[Pattern]) -> list[Pattern]:
    """The update of Muon from a momentum matrix X. Both matrices are given as parts, the rows of each role.

    Muon repeats X (a + b X'X + c (X'X)^2) several times. For Muon's a, b, c the factor in brackets is positive definite, as
    b^2 < 4ac. So zero rows stay zero, other rows do not become zero, and equal rows stay equal, also within one part. The
    product equals (a + b XX' + c (XX')^2) X, so columns that are equal in the whole matrix stay equal; columns that are equal
    only in one part do not. Sums that are zero would stay zero in exact arithmetic, but not in bfloat16, which torch uses.
    """
    columns = all(part.equal_columns for part in parts)
    return [part if part.zero else _equal(part.equal_rows, columns) for part in parts]


def _equal(rows: bool, columns: bool) -> Pattern:
    """The pattern of a matrix that is only known to have equal rows, equal columns, both or neither."""
    sums: dict[bool, Sums] = {True: "equal", False: "any"}
    return Pattern(equal_rows=rows, equal_columns=columns, row_sums=sums[rows], column_sums=sums[columns])


def updated(weight: Pattern, gradient: Pattern, updates: Updates) -> Pattern:
    """The pattern of a weight after an optimiser step along `gradient`.

    Row and column sums stay known if the step is linear in the gradient, or if they follow from equal rows or columns.
    """
    if gradient.zero:
        return weight
    equal = _equal(weight.equal_rows and gradient.equal_rows, weight.equal_columns and gradient.equal_columns)
    if updates == "elementwise":
        return equal

    def sums(one: Sums, other: Sums, known: Sums) -> Sums:
        return known if "any" in (one, other) else "zero" if one == other == "zero" else "equal"

    return replace(
        equal,
        row_sums=sums(weight.row_sums, gradient.row_sums, equal.row_sums),
        column_sums=sums(weight.column_sums, gradient.column_sums, equal.column_sums),
    )


@dataclass(frozen=True)
class Attention:
    """softmax(query @ key) @ value in `heads` heads; with `rotary`, positions rotate queries and keys first.

    A uniform vector is uniform in each head. A centred vector need not be centred in each head, unless there is only one head.
    If all heads have the same attention weights, the output is of the same kind as the values.
    """

    query: Vector
    key: Vector
    value: Vector
    heads: int
    rotary: bool = False

    @property
    def key_differences(self) -> Kind:
        """The kind of what differs between the keys of tokens; all else adds the same number to all logits of a query."""
        if self.rotary:
            return "generic" if self.key else "zero"
        return self.key.own

    @property
    def is_mean(self) -> bool:
        """Whether all logits of a query are the same, so that every token receives the mean of the values."""
        seen = "zero" not in (self.query.kind, self.key_differences)
        return not seen or (not self.rotary and self._orthogonal(self.query.kind, self.key.own))

    @property
    def alike(self) -> bool:
        """Whether all heads have the same attention weights."""
        key = self.key.kind if self.rotary else self.key.own
        return self.heads == 1 or self.is_mean or self.query.kind == key == "uniform"

    @property
    def mixed(self) -> Vector:
        """The output. Softmax weights sum to one, so the part that all values share passes unchanged."""
        if self.is_mean:
            return self.value.averaged
        own = self.value.own if self.alike or self.value.own == "zero" else "generic"
        return Vector(own, self.value.shared)

    def gradients(self, delta: Vector) -> tuple[Vector, Vector, Vector]:
        """The gradients of queries, keys and values, from the gradient of the output.

        Logits receive a gradient if values differ between tokens, and queries receive one if keys differ between tokens. The
        part that all keys share receives none, so without `rotary` the gradients of the keys sum to zero over tokens.
        """
        logits = bool(delta) and self.value.own != "zero" and not self._orthogonal(delta.kind, self.value.own)
        same = self.heads == 1 or (self.alike and delta.kind == self.value.own == "uniform")
        to_query = self._of_others(self.key_differences, same) if logits else NOTHING
        to_key = self._of_others(self.query.kind, same) if logits else NOTHING
        if self.is_mean or not delta:
            return to_query, to_key, delta.averaged
        return to_query, to_key, Vector(own=delta.kind if self.alike else "generic")

    def _of_others(self, kind: Kind, alike: bool) -> Vector:
        """A weighted sum of keys or queries of other tokens; `alike` says whether its factors are the same in all heads."""
        return Vector(own=kind if kind == "zero" or (alike and not self.rotary) else "generic")

    def _orthogonal(self, one: Kind, other: Kind) -> bool:
        """Whether the product of two vectors vanishes in each head."""
        return self.heads == 1 and {one, other} == {"uniform", "centred"}

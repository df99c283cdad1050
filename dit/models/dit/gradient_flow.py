"""One forward and backward pass of a DiT, read on the patterns of its weights."""

from __future__ import annotations

from collections.abc import Mapping

from dit.models.gradient_flow import (
    ANYTHING,
    NOTHING,
    PER_SAMPLE,
    Kind,
    Pattern,
    Vector,
    activation,
    has,
    linear,
    outer,
    slope,
    total,
    transposed,
)


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
        label: Kind = "zero" if table == "zero" else "uniform" if has(table, "equal_columns") else "generic"
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

"""One forward and backward pass of a DiT, computed on the patterns of its weights."""

from __future__ import annotations

from collections.abc import Mapping

from dit.models.gradient_flow import (
    ANYTHING,
    NOTHING,
    ONE,
    PER_SAMPLE,
    ZERO,
    Attention,
    Pattern,
    Vector,
    activation,
    linear,
    outer,
    slope,
    total,
    transposed,
)


class Flow:
    """One forward and backward pass of a DiT of `depth` blocks on `tokens` tokens.

    `gradients` holds the pattern of each role's gradient. Inputs, positions, and the gradient of the loss by the output are
    generic; tokens and their norms are never zero. Each part that another network may replace, such as a norm, is a method that
    a subclass may override.
    """

    rotary = False

    def __init__(self, weights: Mapping[str, Pattern], depth: int, num_heads: int, tokens: int) -> None:
        self.weights = weights
        self.gradients: dict[str, Pattern] = dict.fromkeys(weights, ZERO)
        self.num_heads = num_heads
        self.one_token = tokens == 1
        self.conditioning_gradient = NOTHING
        self._embed_conditioning()
        stream = self._final_layer()
        for index in reversed(range(depth)):
            self._mlp(f"block[{index}]", stream)
            self._attention(f"block[{index}]", stream)
        self._receive("patch_embed", stream, ANYTHING)
        self._conditioning_backward()

    def _embed_conditioning(self) -> None:
        """SiLU(timestep_mlp.out(SiLU(timestep_mlp.in(features))) + label); keeps the inputs of both SiLU as attributes."""
        self.timestep_hidden = self._linear("timestep_mlp.in", PER_SAMPLE)
        label = transposed(PER_SAMPLE, self.weights["label_table.weight"])  # a row of the table
        self.embedding = self._linear("timestep_mlp.out", activation(self.timestep_hidden)) + label
        self.conditioning = activation(self.embedding)

    def _final_layer(self) -> Vector:
        """projection(norm(x) * (1 + scale) + shift); returns the gradient of the residual stream x."""
        modulated = self._modulate("final.modulation", "final.norm")
        delta = self._receive("final.projection", ANYTHING, modulated)
        return self._modulate_backward("final.modulation", "final.norm", delta)

    def _mlp(self, block: str, stream: Vector) -> None:
        """x + gate * mlp_out(hidden(norm(x) * (1 + scale) + shift))."""
        role, norm = f"{block}.modulation.mlp", f"{block}.norm.mlp"
        modulated = self._modulate(role, norm)
        active = self._hidden(block, modulated)
        branch = self._gate(f"{role}.gate", stream, self._linear(f"{block}.mlp_out", active))
        delta = self._receive(f"{block}.mlp_out", branch, active)
        self._modulate_backward(role, norm, self._hidden_backward(block, modulated, delta))

    def _hidden(self, block: str, x: Vector) -> Vector:
        """GELU(mlp_in(x))."""
        return activation(self._linear(f"{block}.mlp_in", x))

    def _hidden_backward(self, block: str, x: Vector, delta: Vector) -> Vector:
        return self._receive(f"{block}.mlp_in", delta * slope(self._linear(f"{block}.mlp_in", x)), x)

    def _attention(self, block: str, stream: Vector) -> None:
        """x + gate * attn_out(attention(query(h), key(h), value(h))), where h = norm(x) * (1 + scale) + shift."""
        role, norm = f"{block}.modulation.attn", f"{block}.norm.attn"
        modulated = self._modulate(role, norm)
        query, key, value = (self._linear(f"{block}.qkv.{name}", modulated) for name in ("query", "key", "value"))
        attention = Attention(
            self._head_norm(f"{block}.norm.query", query),
            self._head_norm(f"{block}.norm.key", key),
            value,
            heads=self.num_heads,
            rotary=self.rotary and not self.one_token,
        )
        branch = self._gate(f"{role}.gate", stream, self._linear(f"{block}.attn_out", attention.mixed))
        delta = self._receive(f"{block}.attn_out", branch, attention.mixed)
        to_query, to_key, to_value = attention.gradients(delta)
        to_query = self._head_norm_backward(f"{block}.norm.query", query, to_query)
        received = self._receive(f"{block}.qkv.query", to_query, modulated)
        received = received + self._receive(f"{block}.qkv.value", to_value, modulated)
        from_key = self._receive_keys(block, key, to_key, modulated)
        self._modulate_backward(role, norm, received + from_key, received if self._sum_vanishes(key) else None)

    def _receive_keys(self, block: str, key: Vector, delta: Vector, modulated: Vector) -> Vector:
        """`_receive` for keys. If the gradients of all keys sum to zero, the part that all keys share receives no gradient."""
        delta = self._head_norm_backward(f"{block}.norm.key", key, delta)
        if not self._sum_vanishes(key):
            return self._receive(f"{block}.qkv.key", delta, modulated)
        received = self._receive(f"{block}.qkv.key", delta, Vector(own=modulated.own))
        self.gradients[f"{block}.qkv.key.bias"] = ZERO
        return received

    def _sum_vanishes(self, key: Vector) -> bool:
        """Whether the gradients of a layer's keys, before any norm or position, sum to zero over tokens."""
        return True

    def _head_norm(self, norm: str, x: Vector) -> Vector:
        """The norm of each head's queries or keys; DiT has none."""
        return x

    def _head_norm_backward(self, norm: str, x: Vector, delta: Vector) -> Vector:
        return delta

    def _conditioning_backward(self) -> None:
        delta = self.conditioning_gradient * slope(self.embedding)
        self.gradients["label_table.weight"] = outer(PER_SAMPLE, delta)  # a row of the table for each label
        hidden = self._receive("timestep_mlp.out", delta, activation(self.timestep_hidden))
        self._receive("timestep_mlp.in", hidden * slope(self.timestep_hidden), PER_SAMPLE)

    def _linear(self, layer: str, x: Vector) -> Vector:
        return linear(x, self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"])

    def _receive(self, layer: str, delta: Vector, x: Vector) -> Vector:
        """Record the gradients of a linear layer with input `x` and output gradient `delta`; return its input's gradient."""
        self.gradients[f"{layer}.weight"] = outer(delta, x)
        self.gradients[f"{layer}.bias"] = total(delta)
        return transposed(delta, self.weights[f"{layer}.weight"])

    def _norm(self, norm: str) -> Vector:
        """norm(x), where x is the residual stream and the norm is a layer norm without weights."""
        return Vector(shared="centred") if self.one_token else Vector(own="centred")

    def _norm_backward(self, norm: str, delta: Vector) -> Vector:
        """The gradient of x. Layer norm removes the part of the gradient that all features share."""
        return self._norm(norm) if {delta.own, delta.shared} - {"zero", "uniform"} else NOTHING

    def _scale(self, role: str) -> Vector:
        """1 + scale."""
        weight, bias = (self.weights[f"{role}.scale.{kind}"] for kind in ("weight", "bias"))
        varying = linear(self.conditioning, weight)
        if not varying and bias.minus_one:
            return NOTHING
        return ONE + varying + linear(NOTHING, weight, bias)

    def _modulate(self, role: str, norm: str) -> Vector:
        """norm(x) * (1 + scale) + shift."""
        return self._norm(norm) * self._scale(role) + self._linear(f"{role}.shift", self.conditioning)

    def _modulate_backward(self, role: str, norm: str, delta: Vector, summed: Vector | None = None) -> Vector:
        """Record the gradients of shift and scale; return the gradient of the residual stream x.

        The gradient of shift is the sum over tokens of `summed`, or of `delta` if `summed` is None.
        """
        self._modulation_receives(f"{role}.shift", delta if summed is None else summed)
        self._modulation_receives(f"{role}.scale", delta * self._norm(norm))
        return self._norm_backward(norm, delta * self._scale(role))

    def _gate(self, role: str, stream: Vector, branch: Vector) -> Vector:
        """Record the gradient of the gate in `x + gate * branch`, whose gradient is `stream`; return the branch's gradient."""
        self._modulation_receives(role, stream * branch)
        return stream * self._linear(role, self.conditioning)

    def _modulation_receives(self, role: str, delta: Vector) -> None:
        received = self._receive(role, Vector(shared=delta.kind), self.conditioning)
        self.conditioning_gradient = self.conditioning_gradient + received

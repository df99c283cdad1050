"""The matrix products of a DiT and the operations between them, each with a derivative that is written by hand.

On CUDA they are Triton kernels and cuBLASLt products (`dit.fused.kernels`); elsewhere they are the same formulas in PyTorch.
Tests compare the kernels with the formulas, and the formulas with autograd in float64. Tokens are (B, T, D), modulation is
(B, D).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dit.fused.gelu import CUBE, ROOT

EPS = 1e-6
"""The epsilon of the model's layer norms."""

PLACE = "_gradient_place"


def write_gradient(weight: Tensor, place: Tensor) -> None:
    """Make `linear`, `attention` and `mlp` write the gradient of `weight` to `place`, which has the same shape."""
    setattr(weight, PLACE, place)


def _place(weight: Tensor) -> Tensor | None:
    return getattr(weight, PLACE, None)


def residual_norm(x: Tensor, branch: Tensor, bias: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`x + gate * (branch + bias)`, and its modulated layer norm: the end of one branch and the start of the next.

    Tokens `x` (B, T, D), or (1, T, D) if all samples share them and they need no gradient; `branch` (B, T, D), `bias` (D,),
    `gate`, `shift` and `scale` (B, D) -> two tensors (B, T, D).
    """
    return _ResidualNorm.apply(x, branch, bias, gate, shift, scale)


def attention(h: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """Multi-head self-attention up to its output projection: `h` (B, T, D), `weight` (3D, D), `bias` (3D,) -> (B, T, D)."""
    return _Attention.apply(h, weight, bias, num_heads)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`: (B, T, K), (M, K) -> (B, T, M)."""
    return _Linear.apply(x, weight)


def mlp(h: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> Tensor:
    """`gelu(h @ weight_in.T + bias_in) @ weight_out.T`: (B, T, D), (H, D), (H,), (D, H) -> (B, T, D)."""
    if not torch.is_grad_enabled():
        return _kernels(h).linear(_kernels(h).gelu_linear(h, weight_in, bias_in), weight_out)
    return _MLP.apply(h, weight_in, bias_in, weight_out)


class _ResidualNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, bias: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Any:
        x_out, h, mean, rstd = _kernels(x).residual_norm(x, branch, bias, gate, shift, scale, EPS)
        ctx.save_for_backward(x_out, branch, bias, gate, scale, mean, rstd)
        return x_out, h

    @staticmethod
    def backward(ctx: Any, dx_out: Tensor, dh: Tensor) -> Any:
        x_out, branch, bias, gate, scale, mean, rstd = ctx.saved_tensors
        dx_out, dh = dx_out.contiguous(), dh.contiguous()
        gradients = _kernels(dh).residual_norm_backward(dx_out, dh, x_out, branch, bias, gate, scale, mean, rstd)
        return tuple(gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=True))


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = _place(weight)
        return _kernels(x).linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        return _kernels(x).matmul(dy, weight), _kernels(x).outer(dy, x, ctx.place)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
        qkv = _kernels(h).linear(h, weight, bias)  # (B, T, 3D)
        out, lse = _kernels(h).attention(qkv, num_heads)
        ctx.save_for_backward(h, weight, qkv, out, lse)
        ctx.num_heads, ctx.place = num_heads, _place(weight)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        h, weight, qkv, out, lse = ctx.saved_tensors
        dqkv, dbias = _kernels(h).attention_backward(dout.contiguous(), qkv, out, lse, ctx.num_heads)
        return _kernels(h).matmul(dqkv, weight), _kernels(h).outer(dqkv, h, ctx.place), dbias, None


class _MLP(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> Tensor:
        a, u = _kernels(h).linear_gelu(h, weight_in, bias_in)
        ctx.save_for_backward(h, u, a, weight_in, weight_out)
        ctx.places = _place(weight_in), _place(weight_out)
        return _kernels(h).linear(a, weight_out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        h, u, a, weight_in, weight_out = ctx.saved_tensors
        dout = dout.contiguous()
        fast = _kernels(h)
        du, dbias = fast.matmul_dgelu(dout, weight_out, u)
        place_in, place_out = ctx.places
        return fast.matmul(du, weight_in), fast.outer(du, h, place_in), dbias, fast.outer(dout, a, place_out)


def _kernels(x: Tensor) -> Any:
    if x.is_cuda:
        from dit.fused import kernels

        return kernels
    return Reference


class Reference:
    """The functions of `dit.fused.kernels`, with the same signatures, in plain PyTorch."""

    @staticmethod
    def residual_norm(
        x: Tensor, branch: Tensor, bias: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The new x, its modulated norm h, and the mean and inverse standard deviation of each token, (B, T, 1)."""
        x = x + gate[:, None] * (branch + bias)
        mean = x.mean(-1, keepdim=True)
        rstd = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
        return x, (1 + scale[:, None]) * (x - mean) * rstd + shift[:, None], mean, rstd

    @staticmethod
    def residual_norm_backward(
        dx_out: Tensor, dh: Tensor, x_out: Tensor, branch: Tensor, bias: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
        rstd: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of x, branch, bias, gate, shift and scale.

        With xhat the normalised x and g = (1 + scale) dh: dx = dx_out + rstd (g - mean(g) - xhat mean(g xhat)), means over D;
        Ba et al. (2016). Unlike there, each sample has its own gain and shift.
        """
        xhat = (x_out - mean) * rstd
        dxhat = (1 + scale[:, None]) * dh
        centred = dxhat - dxhat.mean(-1, keepdim=True) - xhat * (dxhat * xhat).mean(-1, keepdim=True)
        dx = dx_out + rstd * centred
        dbranch = gate[:, None] * dx
        return dx, dbranch, dbranch.sum((0, 1)), (dx * (branch + bias)).sum(1), dh.sum(1), (dh * xhat).sum(1)

    @staticmethod
    def attention(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """(B, T, 3D) -> the concatenated heads (B, T, D), and the log-sum-exp of every query, (B, heads, T)."""
        q, k, v = _split(qkv, num_heads)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        return _merge(scores.softmax(-1) @ v), scores.logsumexp(-1)

    @staticmethod
    def attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """Gradient of qkv and its sum over tokens. dS = P (dP - rowsum(dout out)), P the probabilities; Dao et al. (2022)."""
        q, k, v = _split(qkv, num_heads)
        (g,), (o,) = _split(dout, num_heads, 1), _split(out, num_heads, 1)
        scale = q.shape[-1] ** -0.5
        p = (q @ k.mT * scale - lse[..., None]).exp()
        ds = p * (g @ v.mT - (g * o).sum(-1, keepdim=True))
        dqkv = torch.cat([_merge(part) for part in (ds @ k * scale, ds.mT @ q * scale, p.mT @ g)], dim=2)
        return dqkv, dqkv.sum((0, 1))

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`."""
        return F.linear(x, weight, bias)

    @staticmethod
    def matmul(dy: Tensor, weight: Tensor) -> Tensor:
        """`dy @ weight`."""
        return dy @ weight

    @staticmethod
    def outer(dy: Tensor, x: Tensor, place: Tensor | None = None) -> Tensor:
        """Gradient of the weight of a linear layer: (B, T, M) and (B, T, K) -> (M, K), a new tensor or a view of `place`."""
        gradient = dy.flatten(0, 1).T @ x.flatten(0, 1)
        return gradient if place is None else place.copy_(gradient).view_as(place)

    @staticmethod
    def gelu_linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The GELU of `h @ weight.T + bias`."""
        return F.gelu(F.linear(h, weight, bias), approximate="tanh")

    @staticmethod
    def linear_gelu(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The GELU of `u = h @ weight.T + bias`, and u."""
        u = F.linear(h, weight, bias)
        return F.gelu(u, approximate="tanh"), u

    @staticmethod
    def matmul_dgelu(dy: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """`(dy @ weight) * gelu'(u)`, and its sum over all dimensions except the last.

        With z = r (u + c u^3), the GELU is u (1 + tanh z) / 2, and the derivative of tanh z by z is 1 - tanh(z)^2.
        """
        t = torch.tanh(ROOT * (u + CUBE * u**3))
        du = (dy @ weight) * (0.5 * (1 + t) + 0.5 * u * (1 - t**2) * ROOT * (1 + 3 * CUBE * u**2))
        return du, du.flatten(0, -2).sum(0)


def _split(x: Tensor, num_heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """(B, T, parts * D) -> `parts` tensors (B, heads, T, D / heads)."""
    return x.unflatten(2, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _merge(x: Tensor) -> Tensor:
    """(B, heads, T, D / heads) -> (B, T, D)."""
    return x.transpose(1, 2).flatten(2)

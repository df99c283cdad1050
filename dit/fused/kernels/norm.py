"""The gated residual, the norm after it and its modulation, forward and backward; each reads its inputs only once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit.fused.kernels.sums import add_rows, divisor

PROGRAMS = 1024
"""Desired number of programs in the norm's backward pass: enough for every multiprocessor to have several in flight."""

NORM_STAGES = 3
"""Tokens in flight in one program of the norm's backward."""

FOLD = 256
"""Number of columns of one program that adds partial sums."""


@triton.jit
def _residual_norm_forward(
    x, branch, bias, gate, shift, scale, x_out, h, mean_out, rstd_out, tokens, gate_stride, stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK tokens of one sample. If SHARED, `x` has one sample, which all samples share."""
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    first = tl.program_id(0) * CHUNK
    sample = first // tokens
    first_x = first % tokens if SHARED else first
    shift_row = tl.load(shift + sample * stride + columns, inside, 0.0).to(tl.float32)
    scale_row = 1.0 + tl.load(scale + sample * stride + columns, inside, 0.0).to(tl.float32)
    gate_row = tl.load(gate + sample * gate_stride + columns, inside, 0.0).to(tl.float32)
    bias_row = tl.load(bias + columns, inside, 0.0).to(tl.float32)
    for row in range(CHUNK):
        at = (first + row).to(tl.int64) * D + columns
        old = tl.load(x + (first_x + row).to(tl.int64) * D + columns, inside, 0.0).to(tl.float32)
        added = tl.load(branch + at, inside, 0.0).to(tl.float32) + bias_row
        rounded = (old + gate_row * added).to(x_out.dtype.element_ty)
        tl.store(x_out + at, rounded, inside)
        value = rounded.to(tl.float32)
        mean = tl.sum(value, 0) / D
        centred = tl.where(inside, value - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        tl.store(mean_out + first + row, mean)
        tl.store(rstd_out + first + row, rstd)
        tl.store(h + at, (centred * rstd * scale_row + shift_row).to(h.dtype.element_ty), inside)


@triton.jit
def _residual_norm_backward(
    dx_out, dh, x_out, branch, bias, gate, scale, mean_in, rstd_in, dx, dbranch, partial, tokens, planes, gate_stride, stride,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK tokens of one sample. Writes the sums of dh, dh xhat, dx (branch + bias) and dx over these tokens to
    `partial` (4, planes, D).
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    program = tl.program_id(0)
    first = program * CHUNK
    sample = first // tokens
    scale_row = 1.0 + tl.load(scale + sample * stride + columns, inside, 0.0).to(tl.float32)
    gate_row = tl.load(gate + sample * gate_stride + columns, inside, 0.0).to(tl.float32)
    bias_row = tl.load(bias + columns, inside, 0.0).to(tl.float32)
    sum_shift = tl.zeros([BLOCK], tl.float32)
    sum_scale = tl.zeros([BLOCK], tl.float32)
    sum_gate = tl.zeros([BLOCK], tl.float32)
    sum_dx = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(CHUNK, num_stages=STAGES):
        at = (first + row).to(tl.int64) * D + columns
        dhidden = tl.load(dh + at, inside, 0.0).to(tl.float32)
        value = tl.load(x_out + at, inside, 0.0).to(tl.float32)
        dresidual = tl.load(dx_out + at, inside, 0.0).to(tl.float32)
        added = tl.load(branch + at, inside, 0.0).to(tl.float32) + bias_row
        rstd = tl.load(rstd_in + first + row)
        xhat = tl.where(inside, (value - tl.load(mean_in + first + row)) * rstd, 0.0)
        dxhat = dhidden * scale_row
        dvalue = dresidual + rstd * (dxhat - tl.sum(dxhat, 0) / D - xhat * (tl.sum(dxhat * xhat, 0) / D))
        sum_shift += dhidden
        sum_scale += dhidden * xhat
        sum_gate += dvalue * added
        sum_dx += dvalue
        tl.store(dx + at, dvalue.to(dx.dtype.element_ty), inside)
        tl.store(dbranch + at, (dvalue * gate_row).to(dbranch.dtype.element_ty), inside)
    out = partial + program.to(tl.int64) * D + columns
    plane = planes.to(tl.int64) * D
    tl.store(out, sum_shift, inside)
    tl.store(out + plane, sum_scale, inside)
    tl.store(out + 2 * plane, sum_gate, inside)
    tl.store(out + 3 * plane, sum_dx, inside)


@triton.jit
def _fold(
    partial, gate, dshift, dscale, dgate, dbias, planes, gate_stride, D: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    """One program: BLOCK columns of one sample. Adds the CHUNKS partial sums of the sample. `dbias` is still per sample."""
    sample = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    plane = planes.to(tl.int64) * D
    at = partial + sample.to(tl.int64) * CHUNKS * D + columns
    total_shift = tl.zeros([BLOCK], tl.float32)
    total_scale = tl.zeros([BLOCK], tl.float32)
    total_gate = tl.zeros([BLOCK], tl.float32)
    total_dx = tl.zeros([BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        total_shift += tl.load(at + chunk * D, inside, 0.0)
        total_scale += tl.load(at + plane + chunk * D, inside, 0.0)
        total_gate += tl.load(at + 2 * plane + chunk * D, inside, 0.0)
        total_dx += tl.load(at + 3 * plane + chunk * D, inside, 0.0)
    gate_row = tl.load(gate + sample * gate_stride + columns, inside, 0.0).to(tl.float32)
    out = sample * D + columns
    tl.store(dshift + out, total_shift.to(dshift.dtype.element_ty), inside)
    tl.store(dscale + out, total_scale.to(dscale.dtype.element_ty), inside)
    tl.store(dgate + out, total_gate.to(dgate.dtype.element_ty), inside)
    tl.store(dbias + out, total_dx * gate_row, inside)


def _chunk(batch: int, tokens: int) -> int:
    """The number of tokens, of one sample, for one program of the norm's backward pass; at most 16 programs share a sample."""
    chunks = 1
    while tokens % (2 * chunks) == 0 and batch * chunks < PROGRAMS and chunks < 16:
        chunks *= 2
    return tokens // chunks


def residual_norm(
    x: Tensor, branch: Tensor, bias: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`operations.residual_norm` forward: the new x, h, and the mean and inverse standard deviation of each row, (B * T,)."""
    batch, tokens, width = branch.shape
    chunk, block = divisor(tokens, 4), triton.next_power_of_2(width)
    x_out, h = torch.empty_like(branch), torch.empty_like(branch)
    mean, rstd = branch.new_empty((2, batch * tokens), dtype=torch.float32)
    _residual_norm_forward[(batch * tokens // chunk,)](
        x, branch, bias, gate, shift, scale, x_out, h, mean, rstd, tokens, gate.stride(0), shift.stride(0), eps,
        D=width, BLOCK=block, CHUNK=chunk, SHARED=len(x) < batch, num_warps=1,
    )  # fmt: skip
    return x_out, h, mean, rstd


def residual_norm_backward(
    dx_out: Tensor, dh: Tensor, x_out: Tensor, branch: Tensor, bias: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, branch, bias, gate, shift and scale."""
    batch, tokens, width = x_out.shape
    chunk, block = _chunk(batch, tokens), triton.next_power_of_2(width)
    planes = batch * tokens // chunk
    dx, dbranch = torch.empty_like(x_out), torch.empty_like(x_out)
    partial = x_out.new_empty((4, planes, width), dtype=torch.float32)
    _residual_norm_backward[(planes,)](
        dx_out, dh, x_out, branch, bias, gate, scale, mean, rstd, dx, dbranch, partial, tokens, planes, gate.stride(0),
        scale.stride(0), D=width, BLOCK=block, CHUNK=chunk, STAGES=NORM_STAGES, num_warps=min(4, max(1, block // 256)),
    )  # fmt: skip
    dshift, dscale, dgate = (scale.new_empty((batch, width)) for _ in range(3))
    dbias = scale.new_empty((batch, width), dtype=torch.float32)
    _fold[(batch, triton.cdiv(width, FOLD))](
        partial, gate, dshift, dscale, dgate, dbias, planes, gate.stride(0), D=width, BLOCK=FOLD, CHUNKS=tokens // chunk,
        num_warps=FOLD // 128,
    )  # fmt: skip
    return dx, dbranch, add_rows(dbias, scale.dtype), dgate, dshift, dscale

"""Triton kernels of `dit.fused.residual`, whose class `ResidualReference` holds their formulas in plain PyTorch.

Images are channels last, so that (B, C, H, W) is (B * H * W, C) in memory. All arithmetic is float32, whatever the tensors
hold, and what is summed over pixels is added per chunk of them, in a fixed order and without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNKS = 64
"""Into how many chunks the pixels of a large image are cut, at most, for its statistics."""

STEP_ELEMENTS = 4096
"""Elements that one step of a program reads of each tensor."""


@triton.jit
def _pixels(image, first, pixels, C: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr):
    """Where STEP pixels of an image are, (STEP, C), and which of them are its own, (STEP, 1): all of them, where EVEN."""
    rows = first + tl.arange(0, STEP)
    inside = tl.full([STEP], 1, tl.int1) if EVEN else rows < pixels
    return (image * pixels + rows)[:, None] * C + tl.arange(0, C)[None, :], inside[:, None]


@triton.jit
def _group_statistics(
    x, added, bias, out, partial, pixels,
    C: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK pixels of one image. Each group's sum and sum of squares go to `partial` (B, chunks, 2, GROUPS)."""
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * CHUNK
    columns = tl.arange(0, C)
    total = tl.zeros([STEP, C], tl.float32)
    squares = tl.zeros([STEP, C], tl.float32)
    if BIAS:
        bias_row = tl.load(bias + columns).to(tl.float32)[None, :]
    for start in tl.range(0, CHUNK, STEP):
        at, inside = _pixels(image, first + start, pixels, C, STEP, EVEN)
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        if ADD:
            value += tl.load(added + at, inside, 0.0).to(tl.float32)
        if BIAS:
            value += bias_row
        if ADD:
            rounded = value.to(out.dtype.element_ty)
            tl.store(out + at, rounded, inside)
            value = rounded.to(tl.float32)
        value = tl.where(inside, value, 0.0)
        total += value
        squares += value * value
    to = partial + (image * tl.num_programs(0) + tl.program_id(0)) * 2 * GROUPS + tl.arange(0, GROUPS)
    tl.store(to, tl.sum(tl.reshape(tl.sum(total, 0), [GROUPS, C // GROUPS]), 1))
    tl.store(to + GROUPS, tl.sum(tl.reshape(tl.sum(squares, 0), [GROUPS, C // GROUPS]), 1))


@triton.jit
def _group_norm(
    x, partial, bias, gain, offset, out, pixels, eps,
    C: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_READ: tl.constexpr, CHUNK: tl.constexpr,
    STEP: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK pixels of one image, with the statistics of all CHUNKS of it."""
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * CHUNK
    chunks = tl.arange(0, CHUNKS_READ)[:, None]
    at = partial + image * CHUNKS * 2 * GROUPS + chunks * 2 * GROUPS + tl.arange(0, GROUPS)[None, :]
    count = pixels * (C // GROUPS)
    mean = tl.sum(tl.load(at, chunks < CHUNKS, 0.0), 0) / count
    square = tl.sum(tl.load(at + GROUPS, chunks < CHUNKS, 0.0), 0) / count
    variance = tl.maximum(square - mean * mean, 0.0)
    rstd = 1.0 / tl.sqrt(variance + eps)
    columns = tl.arange(0, C)
    mean_row = tl.reshape(tl.broadcast_to(mean[:, None], [GROUPS, C // GROUPS]), [C])
    factor = tl.reshape(tl.broadcast_to(rstd[:, None], [GROUPS, C // GROUPS]), [C]) * tl.load(gain + columns).to(tl.float32)
    if BIAS:
        mean_row -= tl.load(bias + columns).to(tl.float32)
    constant = tl.load(offset + columns).to(tl.float32) - mean_row * factor
    for start in tl.range(0, CHUNK, STEP):
        where, inside = _pixels(image, first + start, pixels, C, STEP, EVEN)
        value = tl.load(x + where, inside, 0.0).to(tl.float32) * factor[None, :] + constant[None, :]
        if SILU:
            value *= tl.sigmoid(value)
        tl.store(out + where, value.to(out.dtype.element_ty), inside)


@triton.jit
def _padded_sum(x, added, bias, out, width, height, C: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """One program: one row of pixels of one padded image."""
    row, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source = (image * height + row) * width * C
    target = (image * (height + 1) + row) * (width + 1) * C
    for start in tl.range(0, (width + 1) * C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (row < height) & (at < width * C)
        value = tl.load(x + source + at, inside, 0.0).to(tl.float32) + tl.load(bias + at % C, inside, 0.0).to(tl.float32)
        if ADD:
            value += tl.load(added + source + at, inside, 0.0).to(tl.float32)
        tl.store(out + target + at, value.to(out.dtype.element_ty), at < (width + 1) * C)


@triton.jit
def _doubled_sum(x, added, bias, out, width, height, C: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """One program: one row of pixels of one image, which becomes two rows of twice as many."""
    row, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source = (image * height + row) * width * C
    for start in tl.range(0, width * C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width * C
        value = tl.load(x + source + at, inside, 0.0).to(tl.float32) + tl.load(bias + at % C, inside, 0.0).to(tl.float32)
        if ADD:
            value += tl.load(added + source + at, inside, 0.0).to(tl.float32)
        rounded = value.to(out.dtype.element_ty)
        to = out + 4 * source + (at // C) * 2 * C + at % C
        tl.store(to, rounded, inside)
        tl.store(to + C, rounded, inside)
        tl.store(to + 2 * width * C, rounded, inside)
        tl.store(to + 2 * width * C + C, rounded, inside)


def group_norm(
    x: Tensor, added: Tensor | None, bias: Tensor | None, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """`x + added + bias`, where it had to be computed, else x; and the group norm of that sum, with a SiLU or not."""
    batch, channels, height, width = x.shape
    x, added = _channels_last(x), None if added is None else _channels_last(added)
    pixels = height * width
    chunk = triton.next_power_of_2(triton.cdiv(pixels, CHUNKS))
    chunks, step, even = triton.cdiv(pixels, chunk), min(chunk, STEP_ELEMENTS // channels), pixels % chunk == 0
    total = x if added is None else torch.empty_like(x)
    left = bias if added is None else None
    partial = x.new_empty((batch, chunks, 2, groups), dtype=torch.float32)
    _group_statistics[(chunks, batch)](
        x, added, bias, total, partial, pixels, C=channels, GROUPS=groups, CHUNK=chunk, STEP=step, EVEN=even,
        ADD=added is not None, BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    out = torch.empty_like(x)
    part = min(chunk, 4 * step)
    _group_norm[(triton.cdiv(pixels, part), batch)](
        total, partial, left, gain, offset, out, pixels, eps, C=channels, GROUPS=groups, CHUNKS=chunks,
        CHUNKS_READ=triton.next_power_of_2(chunks), CHUNK=part, STEP=step, EVEN=even, BIAS=left is not None, SILU=silu,
        num_warps=4,
    )  # fmt: skip
    return total, out


def padded_sum(x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
    """`x + added + bias` with a row of zeros below and a column of zeros at the right: (B, C, H, W) -> (B, C, H + 1, W + 1)."""
    batch, channels, height, width = x.shape
    x, added = _channels_last(x), None if added is None else _channels_last(added)
    shape = batch, channels, height + 1, width + 1
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    block = min(STEP_ELEMENTS, triton.next_power_of_2((width + 1) * channels))
    _padded_sum[(height + 1, batch)](
        x, added, bias, out, width, height, C=channels, BLOCK=block, ADD=added is not None, num_warps=4
    )
    return out


def doubled_sum(x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
    """`x + added + bias` with each pixel four times: (B, C, H, W) -> (B, C, 2 * H, 2 * W)."""
    batch, channels, height, width = x.shape
    x, added = _channels_last(x), None if added is None else _channels_last(added)
    shape = batch, channels, 2 * height, 2 * width
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    block = min(STEP_ELEMENTS, triton.next_power_of_2(width * channels))
    _doubled_sum[(height, batch)](
        x, added, bias, out, width, height, C=channels, BLOCK=block, ADD=added is not None, num_warps=4
    )
    return out


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)

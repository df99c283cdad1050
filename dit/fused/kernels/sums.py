"""Sums over rows, in a fixed order, and functions that the other kernels share."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 512, 512
"""Most rows and columns of one program that sums the gradient of a bias."""


@triton.jit
def _sum_rows(x, out, D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """One program: sums CHUNK rows of BLOCK columns, and writes the result to one row of `out`."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([STEP, BLOCK], tl.float32)
    for start in tl.range(0, CHUNK, STEP, num_stages=3):
        rows = (tl.program_id(0) * CHUNK + start + tl.arange(0, STEP)).to(tl.int64)
        total += tl.load(x + rows[:, None] * D + columns[None, :]).to(tl.float32)
    tl.store(out + tl.program_id(0) * D + columns, tl.sum(total, 0).to(out.dtype.element_ty))


def sum_rows(x: Tensor) -> Tensor:
    """The sum over all dimensions except the last, (D,)."""
    width = x.shape[-1]
    rows, block = x.numel() // width, divisor(width, COLUMNS)
    chunk = divisor(rows, ROWS)
    partial = x.new_empty((rows // chunk, width), dtype=torch.float32)
    _sum_rows[(rows // chunk, width // block)](x, partial, D=width, BLOCK=block, CHUNK=chunk, STEP=min(8, chunk), num_warps=4)
    return add_rows(partial, x.dtype)


def add_rows(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the rows of a small matrix (rows, D) in float32 -> (D,) in `dtype`."""
    rows, width = partial.shape
    out = partial.new_empty((width,), dtype=dtype)
    step, block = divisor(rows, 64), divisor(width, 32)
    _sum_rows[(1, width // block)](partial, out, D=width, BLOCK=block, CHUNK=rows, STEP=step, num_warps=4)
    return out


def divisor(number: int, most: int) -> int:
    """The greatest power of two up to `most` that divides `number`."""
    return min(most, number & -number)


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether `device` is a GPU of the Hopper generation, such as H100 and H200."""
    return torch.cuda.get_device_capability(device)[0] == 9


@cache
def has_tensor_copies(device: torch.device) -> bool:
    """Whether `device` has an instruction that copies a tile by a tensor descriptor, as Hopper and its successors have."""
    return torch.cuda.get_device_capability(device)[0] >= 9

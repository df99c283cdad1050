"""Matrix products: from cuBLASLt, with fused epilogues, and one Triton kernel, as one epilogue of cuBLASLt is slow."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit.fused import cublaslt, gelu
from dit.fused.kernels.sums import add_rows, is_hopper, sum_rows

ROOT, CUBE = tl.constexpr(gelu.ROOT), tl.constexpr(gelu.CUBE)

NARROW = 768
"""Up to this width, on Hopper, the Triton product with the GELU's derivative is faster than cuBLASLt's with a sum after it.

Measured on an H100: 0.26 ms instead of 0.32 ms for 65536 tokens of DiT-S/2, 0.70 ms instead of 0.71 ms for DiT-B/2; but 0.69 ms
instead of 0.64 ms for 32768 tokens of DiT-XL/2.
"""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`."""
    return cublaslt.linear(x.flatten(0, 1), weight, bias).view(*x.shape[:2], -1)


def gelu_linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The GELU of `h @ weight.T + bias`."""
    return cublaslt.gelu_linear(h.flatten(0, 1), weight, bias).view(*h.shape[:2], -1)


def linear_gelu(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The GELU of `u = h @ weight.T + bias`, and u."""
    a, u = cublaslt.linear_gelu(h.flatten(0, 1), weight, bias)
    return a.view(*h.shape[:2], -1), u.view(*h.shape[:2], -1)


def matmul(dy: Tensor, weight: Tensor) -> Tensor:
    """`dy @ weight`."""
    return cublaslt.matmul(dy.flatten(0, 1), weight).view(*dy.shape[:2], -1)


@triton.jit
def _dgelu(u):
    """The derivative of the tanh-approximated GELU. The GPU's instruction for tanh is exact to 11 bits, and bf16 has 8."""
    square = u * u
    z = u * (ROOT + ROOT * CUBE * square)
    t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)
    return 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t * t) * (ROOT + 3.0 * ROOT * CUBE * square)


@triton.jit
def _matmul_dgelu(
    dy, weight, u, du, partial, rows, columns,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program: a tile of `du`, and its sums over rows. The tiles of TOGETHER rows of tiles run right after each other."""
    across = tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // (TOGETHER * across)
    height = tl.minimum(tl.cdiv(rows, ROWS) - group * TOGETHER, TOGETHER)
    within = tl.program_id(0) % (TOGETHER * across)
    row, column = group * TOGETHER + within % height, within // height
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, K, DEPTH):
        product = tl.dot(dy.load([row * ROWS, k]), weight.load([k, column * COLUMNS]), product)
    at = column * COLUMNS + tl.arange(0, COLUMNS)
    gradient = product * _dgelu(u.load([row * ROWS, column * COLUMNS]).to(tl.float32))
    du.store([row * ROWS, column * COLUMNS], gradient.to(tl.bfloat16))
    tl.store(partial + row * columns + at, tl.sum(gradient, 0), at < columns)


TILE = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "TOGETHER": 16, "num_stages": 3, "num_warps": 8, "maxnreg": 128}
"""Settings of `_matmul_dgelu`, the fastest of twenty that were measured. With more registers for each thread, a multiprocessor
could run only one program at a time.
"""


def matmul_dgelu(dy: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """`(dy @ weight) * gelu'(u)`, and its sum over all dimensions except the last."""
    flat, wide = dy.flatten(0, 1), u.flatten(0, 1)
    (rows, depth), columns = flat.shape, wide.shape[1]
    if depth > NARROW or not is_hopper(dy.device):
        du = cublaslt.matmul_dgelu(flat, weight, wide).view_as(u)
        return du, sum_rows(du)
    du = torch.empty_like(wide)
    down, across = triton.cdiv(rows, TILE["ROWS"]), triton.cdiv(columns, TILE["COLUMNS"])
    partial = du.new_empty((down, columns), dtype=torch.float32)
    blocks = ("ROWS", "DEPTH"), ("DEPTH", "COLUMNS"), ("ROWS", "COLUMNS"), ("ROWS", "COLUMNS")
    described = [
        TensorDescriptor.from_tensor(tensor, [TILE[side] for side in block])
        for tensor, block in zip((flat, weight, wide, du), blocks, strict=True)
    ]
    _matmul_dgelu[(down * across,)](*described, partial, rows, columns, K=depth, **TILE)
    return du.view_as(u), add_rows(partial, du.dtype)


def outer(dy: Tensor, x: Tensor, place: Tensor | None = None) -> Tensor:
    """Gradient of the weight of a linear layer: (B, T, M) and (B, T, K) -> (M, K), a new tensor or a view of `place`."""
    return cublaslt.outer(dy.flatten(0, 1), x.flatten(0, 1), None if place is None else place.view_as(place))

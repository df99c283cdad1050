"""Matrix products whose last step is the GELU or its derivative: cuBLASLt's epilogues, which torch does not offer.

cuBLASLt comes with torch for CUDA. Everything here is bf16, row-major, with float32 sums. cuBLASLt is column-major, so that a matrix
(rows, columns) of ours is one of (columns, rows) there. Names and numbers are those of NVIDIA's `cublasLt.h`.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

COMPUTE_32F, R_32F, R_16BF = 68, 0, 14
TRANSPOSE_A, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LEADING_DIMENSION = 3, 7, 8, 11, 12
GELU_AUX_BIAS, DGELU = 164, 192
MAX_WORKSPACE_BYTES = 1
WORKSPACE_BYTES = 32 << 20


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`u = x @ weight.T + bias` and its tanh-approximated GELU: (N, K), (M, K), (M,) -> two (N, M)."""
    u, a = (x.new_empty((x.shape[0], weight.shape[0])) for _ in range(2))
    _product(a, x, weight, u, bias)
    return a, u


def matmul_dgelu(dy: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """`(dy @ weight) * gelu'(u)`: (N, K), (K, M), (N, M) -> (N, M)."""
    du = torch.empty_like(u)
    _product(du, dy, weight, u, None)
    return du


def _product(out: Tensor, x: Tensor, weight: Tensor, u: Tensor, bias: Tensor | None) -> None:
    library = _library()
    plan = _plan(*out.shape, x.shape[1], bias is not None, x.device.index)
    _set(plan.operation, AUX_POINTER, c_void_p(u.data_ptr()))
    if bias is not None:
        _set(plan.operation, BIAS_POINTER, c_void_p(bias.data_ptr()))
    one, zero = c_float(1), c_float(0)
    target = c_void_p(out.data_ptr())
    _check(
        library.cublasLtMatmul(
            plan.handle, plan.operation, byref(one), c_void_p(weight.data_ptr()), plan.weight, c_void_p(x.data_ptr()), plan.x,
            byref(zero), target, plan.out, target, plan.out, byref(plan.heuristic), c_void_p(plan.workspace.data_ptr()),
            c_size_t(WORKSPACE_BYTES), c_void_p(torch.cuda.current_stream().cuda_stream),
        )
    )  # fmt: skip


class _Plan:
    """Everything about a product but its addresses. The algorithm is cuBLASLt's first proposal: the same at every run."""

    def __init__(self, rows: int, columns: int, inner: int, forward: bool, device: int) -> None:
        self.handle, self.operation, preference = c_void_p(), c_void_p(), c_void_p()
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=torch.device("cuda", device))
        library = _library()
        _check(library.cublasLtCreate(byref(self.handle)))
        _check(library.cublasLtMatmulDescCreate(byref(self.operation), COMPUTE_32F, R_32F))
        _set(self.operation, TRANSPOSE_A, c_int(forward))
        _set(self.operation, EPILOGUE, c_int(GELU_AUX_BIAS if forward else DGELU))
        _set(self.operation, AUX_LEADING_DIMENSION, c_int64(columns))
        self.weight = _layout(inner, columns) if forward else _layout(columns, inner)
        self.x, self.out = _layout(inner, rows), _layout(columns, rows)
        _check(library.cublasLtMatmulPreferenceCreate(byref(preference)))
        limit = c_uint64(WORKSPACE_BYTES)
        _check(library.cublasLtMatmulPreferenceSetAttribute(preference, MAX_WORKSPACE_BYTES, byref(limit), c_size_t(8)))
        self.heuristic, found = _Heuristic(), c_int()
        _check(
            library.cublasLtMatmulAlgoGetHeuristic(
                self.handle, self.operation, self.weight, self.x, self.out, self.out, preference, 1,
                byref(self.heuristic), byref(found),
            )
        )  # fmt: skip
        _check(library.cublasLtMatmulPreferenceDestroy(preference))


_plan = lru_cache(maxsize=None)(_Plan)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    assert torch.version.cuda is not None
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


def _layout(rows: int, columns: int) -> c_void_p:
    """A dense column-major bf16 matrix."""
    layout = c_void_p()
    _check(_library().cublasLtMatrixLayoutCreate(byref(layout), R_16BF, c_uint64(rows), c_uint64(columns), c_int64(rows)))
    return layout


def _set(operation: c_void_p, attribute: int, value: ctypes._SimpleCData) -> None:
    size = c_size_t(ctypes.sizeof(value))
    _check(_library().cublasLtMatmulDescSetAttribute(operation, attribute, byref(value), size))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt answered status {status} (cublasStatus_t)")

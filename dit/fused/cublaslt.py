"""Matrix products with features that torch lacks: the GELU or its derivative as the last step, and a choice of algorithm.

cuBLASLt comes with torch for CUDA. All matrices here are bf16 and row-major, and sums are float32. cuBLASLt is column-major, so
a matrix (rows, columns) here is a matrix (columns, rows) in cuBLASLt. Names and numbers are from NVIDIA's `cublasLt.h`.
"""

from __future__ import annotations

import ctypes
import statistics
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

COMPUTE_32F, R_32F, R_16BF = 68, 0, 14
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LEADING_DIMENSION = 3, 4, 7, 8, 11, 12
DEFAULT, BIAS, GELU_BIAS, GELU_AUX_BIAS, DGELU = 1, 4, 36, 164, 192
MAX_WORKSPACE_BYTES = 1
WORKSPACE_BYTES = 32 << 20
CANDIDATES = 8
"""Number of algorithms that are timed, once for each shape of product."""
TIMED_RUNS, ROUNDS = 5, 3
WORTH_TIMING = 10**10
"""A product with fewer operations uses the first algorithm, since timing would measure the launches by the host.

A product with at least this many operations also shows differences between the summation orders of algorithms: if sums of K
products are added in two halves, hundreds of the 5e9 / K results are rounded to another bf16, for K from 64 to 4608 (simulated
with random numbers).
"""


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: (N, K), (M, K), (M,) -> (N, M)."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _product(out, x, weight, (False, True), DEFAULT if bias is None else BIAS, bias=bias)
    return out


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The tanh-approximated GELU of `x @ weight.T + bias`: (N, K), (M, K), (M,) -> (N, M)."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _product(out, x, weight, (False, True), GELU_BIAS, bias=bias)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The tanh-approximated GELU of `u = x @ weight.T + bias`, and u: (N, K), (M, K), (M,) -> two (N, M)."""
    a, u = (x.new_empty((x.shape[0], weight.shape[0])) for _ in range(2))
    _product(a, x, weight, (False, True), GELU_AUX_BIAS, bias=bias, aux=u)
    return a, u


def matmul(dy: Tensor, weight: Tensor) -> Tensor:
    """`dy @ weight`: (N, M), (M, K) -> (N, K)."""
    out = dy.new_empty((dy.shape[0], weight.shape[1]))
    _product(out, dy, weight, (False, False), DEFAULT)
    return out


def matmul_dgelu(dy: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """`(dy @ weight) * gelu'(u)`: (N, K), (K, M), (N, M) -> (N, M)."""
    du = torch.empty_like(u)
    _product(du, dy, weight, (False, False), DGELU, aux=u)
    return du


def outer(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """`dy.T @ x`: (N, M), (N, K) -> (M, K), written to `out` if it is given."""
    if out is None:
        out = dy.new_empty((dy.shape[1], x.shape[1]))
    _product(out, dy, x, (True, False), DEFAULT)
    return out


def _product(
    out: Tensor, left: Tensor, right: Tensor, transposed: tuple[bool, bool], epilogue: int,
    bias: Tensor | None = None, aux: Tensor | None = None,
) -> None:  # fmt: skip
    """Write `left @ right`, each transposed or not, to `out`.

    In column-major order this is `right.T @ left.T`, so cuBLASLt's A is `right`.
    """
    fixed = torch.are_deterministic_algorithms_enabled()
    plan = _plan(out.shape, left.shape, right.shape, transposed, epilogue, out.device, fixed)
    plan.run(_Operands(out, left, right, bias, aux))


class _Operands(NamedTuple):
    """The tensors of one product. The epilogue reads `aux`, or writes it together with `out`."""

    out: Tensor
    left: Tensor
    right: Tensor
    bias: Tensor | None
    aux: Tensor | None

    def random(self) -> _Operands:
        """Random operands of the same shapes, with the same `out`."""
        draws = torch.Generator(self.out.device).manual_seed(0)

        def other(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor).normal_(generator=draws)

        bias, aux = (None if tensor is None else other(tensor) for tensor in (self.bias, self.aux))
        return _Operands(self.out, other(self.left), other(self.right), bias, aux)

    def written(self) -> list[Tensor]:
        """The tensors that a product may have written."""
        return [self.out] if self.aux is None else [self.out, self.aux]


class _Plan:
    """Everything about a product except the addresses of its tensors."""

    def __init__(
        self, out: torch.Size, left: torch.Size, right: torch.Size, transposed: tuple[bool, bool], epilogue: int,
        device: torch.device, fixed: bool,
    ) -> None:  # fmt: skip
        library = _library()
        self.handle, self.operation, preference = c_void_p(), c_void_p(), c_void_p()
        self.workspace = _workspace(device)
        self.out, self.left, self.right = (_layout(*shape) for shape in (out, left, right))
        _check(library.cublasLtCreate(byref(self.handle)))
        _check(library.cublasLtMatmulDescCreate(byref(self.operation), COMPUTE_32F, R_32F))
        _set(self.operation, TRANSPOSE_A, c_int(transposed[1]))
        _set(self.operation, TRANSPOSE_B, c_int(transposed[0]))
        _set(self.operation, EPILOGUE, c_int(epilogue))
        if epilogue in {GELU_AUX_BIAS, DGELU}:
            _set(self.operation, AUX_LEADING_DIMENSION, c_int64(out[1]))
        _check(library.cublasLtMatmulPreferenceCreate(byref(preference)))
        limit = c_uint64(WORKSPACE_BYTES)
        _check(library.cublasLtMatmulPreferenceSetAttribute(preference, MAX_WORKSPACE_BYTES, byref(limit), c_size_t(8)))
        found, count = (_Heuristic * CANDIDATES)(), c_int()
        _check(
            library.cublasLtMatmulAlgoGetHeuristic(
                self.handle, self.operation, self.right, self.left, self.out, self.out, preference, CANDIDATES, found,
                byref(count),
            )
        )  # fmt: skip
        _check(library.cublasLtMatmulPreferenceDestroy(preference))
        self.shapes = f"{tuple(left)} by {tuple(right)} in bf16"
        if not count.value:
            raise RuntimeError(f"cuBLASLt has no algorithm for {self.shapes}")
        operations = 2 * out.numel() * left[0 if transposed[0] else 1]
        self.candidates = list(found[: count.value if operations >= WORTH_TIMING else 1])
        self.fixed = fixed

    def run(self, operands: _Operands) -> None:
        """Compute the product; the first call chooses the algorithm."""
        if len(self.candidates) > 1:
            self.candidates = [self._fastest(operands.random())]
        _check(self._launch(self.candidates[0], operands))

    def _fastest(self, operands: _Operands) -> _Heuristic:
        """The fastest algorithm among those that work. `operands` are random: zeros, as many gradients are at first, need less
        power, so they would change the times.

        A deterministic run only considers algorithms whose result is bit-identical to that of the first one that works, so the
        choice by time does not change results.
        """
        working: list[_Heuristic] = []
        expected: list[Tensor] = []
        for candidate in self.candidates:
            if self._launch(candidate, operands):
                continue
            if self.fixed and not working:
                expected = [tensor.clone() for tensor in operands.written()]
            if all(map(torch.equal, operands.written(), expected)):
                working.append(candidate)
        if not working:
            raise RuntimeError(f"cuBLASLt ran none of its {len(self.candidates)} algorithms for {self.shapes}")
        rounds = [[self._milliseconds(candidate, operands) for candidate in working] for _ in range(ROUNDS)]
        medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
        return working[medians.index(min(medians))]

    def _milliseconds(self, candidate: _Heuristic, operands: _Operands) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(TIMED_RUNS):
            self._launch(candidate, operands)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _launch(self, candidate: _Heuristic, operands: _Operands) -> int:
        for attribute, tensor in ((BIAS_POINTER, operands.bias), (AUX_POINTER, operands.aux)):
            if tensor is not None:
                _set(self.operation, attribute, c_void_p(tensor.data_ptr()))
        one, zero = c_float(1), c_float(0)
        a, b, target = (c_void_p(tensor.data_ptr()) for tensor in (operands.right, operands.left, operands.out))
        return _library().cublasLtMatmul(
            self.handle, self.operation, byref(one), a, self.right, b, self.left, byref(zero), target, self.out, target,
            self.out, byref(candidate), c_void_p(self.workspace.data_ptr()), c_size_t(WORKSPACE_BYTES),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip


_plan = lru_cache(maxsize=None)(_Plan)


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    assert torch.version.cuda is not None
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


def _layout(rows: int, columns: int) -> c_void_p:
    """The layout of a dense row-major bf16 matrix for cuBLASLt, where its columns are rows."""
    layout = c_void_p()
    _check(_library().cublasLtMatrixLayoutCreate(byref(layout), R_16BF, c_uint64(columns), c_uint64(rows), c_int64(columns)))
    return layout


def _set(operation: c_void_p, attribute: int, value: ctypes._SimpleCData) -> None:
    size = c_size_t(ctypes.sizeof(value))
    _check(_library().cublasLtMatmulDescSetAttribute(operation, attribute, byref(value), size))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt answered status {status} (cublasStatus_t)")

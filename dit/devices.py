"""Which device, precision and backend a computation uses, and how its results are made repeatable."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
from torch import Tensor

from dit.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first available of cuda, mps and cpu.

    Raises `ConfigError` if the device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        there = ", ".join(device for device in available if available[device])
        raise ConfigError(f"device = '{name}' is not on this machine, which has auto, {there}")
    return torch.device(name)


def float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU if `device` has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision; `auto` is bfloat16 on a device of type cuda that supports it, else float32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return DTYPES[name]


def name_of(precision: torch.dtype) -> str:
    """The name in `params.yaml` of the precision `precision`."""
    return next(name for name, dtype in DTYPES.items() if dtype == precision)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast | nullcontext:
    """A context in which operations run in `dtype` (mixed precision); for float32 it changes nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def is_nvidia(device: torch.device) -> bool:
    """Whether `device` is an NVIDIA GPU; only there do the kernels and CUDA graphs of `dit.fused` run."""
    return device.type == "cuda" and torch.version.hip is None


def resolve_backend(name: str, device: torch.device, precision: torch.dtype, supported: bool, section: str, needs: str) -> str:
    """The backend called `name`; `auto` chooses one.

    `auto` is `fused` on an NVIDIA GPU in bf16 if the network is `supported`, else `compiled` on a device of type cuda, else
    `eager`. Raises `ConfigError` if `name` is `fused` and it cannot run here. For the message, `section` is the section of
    `params.yaml` that asks for the backend, and `needs` says which networks are supported.
    """
    can_fuse = is_nvidia(device) and precision == torch.bfloat16 and supported
    if name == "fused" and not can_fuse:
        raise ConfigError(
            f"{section}.backend = 'fused' cannot run here; use auto, compiled or eager (fused needs an NVIDIA GPU, "
            f"{section}.precision bf16, and {needs})"
        )
    if name == "auto":
        return "fused" if can_fuse else "compiled" if device.type == "cuda" else "eager"
    return name


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy `tensor` from the host to `device`; the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def make_deterministic(threads: int, deterministic: bool = True) -> None:
    """Fix the number of CPU threads, since the rounding of sums depends on it; if `deterministic`, make PyTorch deterministic.

    PyTorch then raises an error for operations that have no deterministic version. Call this function before the first CUDA
    operation, as cuBLAS reads its workspace setting only once.
    """
    torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if torch.cuda.is_available():
            torch.use_deterministic_algorithms(True)
        else:
            torch.set_deterministic_debug_mode("error")  # unlike the call above, it does not import torch's compiler (1.5 s)
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

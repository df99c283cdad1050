"""Which device and which arithmetic a computation uses, and how it is made repeatable."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
from torch import Tensor

from dit.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` is the first of cuda, mps, cpu that is there. Raises `ConfigError` for a device that is not."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        there = ", ".join(device for device in available if available[device])
        raise ConfigError(f"device = '{name}' is not on this machine, which has auto, {there}")
    return torch.device(name)


def float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU where that has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return DTYPES[name]


def name_of(precision: torch.dtype) -> str:
    """The name of a precision in `params.yaml`."""
    return next(name for name, dtype in DTYPES.items() if dtype == precision)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast | nullcontext:
    """Mixed precision where `dtype` is below float32, else nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def is_nvidia(device: torch.device) -> bool:
    """Whether `device` is an NVIDIA GPU, for which the kernels and CUDA graphs of `dit.fused` are made."""
    return device.type == "cuda" and torch.version.hip is None


def resolve_backend(name: str, device: torch.device, precision: torch.dtype, supported: bool, section: str, needs: str) -> str:
    """`auto` is `fused` on an NVIDIA GPU in bf16 for a network that it supports, else `compiled` on a GPU, else `eager`.

    Raises `ConfigError` for `fused` where it cannot run; `section` is the one of `params.yaml` that asks for it, and `needs`
    says what a supported network is.
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
    """`tensor` of the host on `device`, without the host waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def make_deterministic(threads: int, deterministic: bool = True) -> None:
    """Fix the number of CPU threads, on which sums depend, and refuse operations without a repeatable version.

    Call it before the first CUDA operation: cuBLAS reads its workspace setting once.
    """
    torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if torch.cuda.is_available():
            torch.use_deterministic_algorithms(True)
        else:
            torch.set_deterministic_debug_mode("error")  # without 1.5 s of importing torch's compiler and setting its flag
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

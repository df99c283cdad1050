"""Weights of a file as tensors by name: safetensors, or a `.pt` whose pickle may hold tensors and plain values only."""

from __future__ import annotations

import argparse
import hashlib
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dit.errors import ConfigError

HOLDERS = ("ema", "model", "state_dict")
"""Keys under which a training checkpoint keeps weights, the first that it has; facebookresearch/DiT train.py, download.py."""


def verify(path: Path, sha256: str) -> None:
    """Raise `ConfigError` unless there is a file at `path` with this digest."""
    try:
        found = path.stat()
        actual = _digest(path, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"path = '{path}': {error.strerror}; expected a .safetensors or .pt file") from None
    if actual != sha256:
        raise ConfigError(f"sha256 = '{sha256}', but that of {path} is {actual}; expected the digest of the file")


@cache
def _digest(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor(path: Path, sha256: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor called `name`, as float32 on the CPU. Raises `ConfigError` where it is missing or has another shape."""
    weights = _read(path, sha256)
    if name not in weights:
        ending = name.partition(".")[2] or name
        near = [key for key in weights if key.endswith(ending)][:3] or list(weights)[:3]
        raise ConfigError(f"{path}: no tensor is called '{name}'; it has {', '.join(near)}, ...; `prefix` stands before a name")
    if tuple(weights[name].shape) != shape:
        raise ConfigError(f"{path}: '{name}' has shape {tuple(weights[name].shape)}; this network expects {shape}")
    return weights[name].float()


def forget() -> None:
    """Release the file that was read last."""
    _read.cache_clear()


@lru_cache(maxsize=1)
def _read(path: Path, sha256: str) -> dict[str, Tensor]:
    verify(path, sha256)
    return read(path)


def read(path: Path) -> dict[str, Tensor]:
    """All tensors by name, of the file itself or of the first holder of `HOLDERS` in it; nothing in it is executed.

    Raises `ConfigError` for a file that holds code, or no tensors by name.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path}: not a safetensors file: {error}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments that train.py of DiT saves beside
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle may raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}, which is code" if named else "it is no such file"
        raise ConfigError(f"{path}: refused: {reason}; expected a file of tensors and plain values alone") from None
    for holder in HOLDERS:
        if isinstance(found, dict) and isinstance(found.get(holder), dict):
            found = found[holder]
            break
    weights = {name: value for name, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    if not weights:
        raise ConfigError(f"{path}: holds no tensors by name; expected a state_dict, or one under {', '.join(HOLDERS)}")
    return weights

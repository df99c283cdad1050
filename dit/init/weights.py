"""Reads the weights of a file as tensors by name: safetensors, or a `.pt` whose pickle holds only tensors and plain values."""

from __future__ import annotations

import argparse
import hashlib
import re
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dit.errors import ConfigError

HOLDERS = (
    "ema",
    "model_ema",
    "ema_model",
    "ema_state_dict",
    "state_dict_ema",
    "params_ema",
    "model",
    "state_dict",
    "model_state_dict",
    "net",
    "network",
    "module",
    "params",
    "weights",
)
"""Keys under which training checkpoints keep weights, possibly one inside another. The first key that holds tensors is read.

facebookresearch/DiT train.py and download.py use some of them; timm, Lightning, DeepSpeed, BasicSR and mmengine, the others.
Averaged weights come first, as the published samplers use them.
"""

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
"""The parts that torch.compile, activation checkpointing and data parallelism add to the names of weights."""

MAX_NESTING = 16
"""How many levels of mappings inside mappings are searched."""

MAX_PICKLE = 256 * 2**20
"""Most bytes of names and plain values in a `.pt`."""


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, and where in a file they are."""

    weights: dict[str, Tensor]
    holder: str
    """The keys of the file that lead to `weights`, joined by dots; empty if `weights` are at the top of the file."""
    others: tuple[str, ...]
    """All other tensors of the file, each as the keys that lead to it, joined by dots."""


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
    """The tensor called `name`, as float32 on the CPU. Raises `ConfigError` if it is missing or has another shape."""
    weights = _read(path, sha256)
    if name not in weights:
        name = _wrapping(weights) + name
    if name not in weights:
        ending = name.partition(".")[2] or name
        near = [key for key in weights if key.endswith(ending)][:3] or list(weights)[:3]
        raise ConfigError(f"{path}: no tensor is called '{name}'; it has {', '.join(near)}, ...; `prefix` stands before a name")
    if tuple(weights[name].shape) != shape:
        raise ConfigError(f"{path}: '{name}' has shape {tuple(weights[name].shape)}; this network expects {shape}")
    return weights[name].float()


def forget() -> None:
    """Free the memory of the tensors that were read last."""
    _read.cache_clear()


def _wrapping(weights: Collection[str]) -> str:
    """The prefix that wrappers, such as data parallelism and torch.compile, gave every name; empty if any name lacks it."""
    first = next(iter(weights), "").split(".")
    count = next((index for index, part in enumerate(first) if part not in WRAPPERS), 0)
    wrapping = "".join(f"{part}." for part in first[:count])
    return wrapping if all(name.startswith(wrapping) for name in weights) else ""


@lru_cache(maxsize=1)
def _read(path: Path, sha256: str) -> dict[str, Tensor]:
    verify(path, sha256)
    return read(path)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of the file by name, as `state_dict` finds them."""
    return state_dict(path).weights


def state_dict(path: Path, key: str = "") -> StateDict:
    """All tensors by name, at the top of the file or in a holder inside it; no code in the file is executed.

    The holder is the mapping that `key` names, such as `"ema"` or `"state.model"`; without `key`, the first of `HOLDERS` that
    holds tensors. Raises `ConfigError` if the file contains code, no tensors by name, or fewer bytes than its tensors need.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: not a file; expected a .safetensors or .pt file")
    found = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    holder = _named(path, found, key.split(".")) if key else _holder(found)
    held: Any = found
    for step in holder:
        held = held[step]
    weights = _tensors(held)
    if not weights:
        where = f"{path}, under {key}," if key else f"{path}"
        keys = ", ".join(map(str, list(found)[:5])) if isinstance(found, dict) and found else "nothing by name"
        raise ConfigError(
            f"{where} holds no tensors by name; expected a state_dict, or one under {', '.join(HOLDERS)} (it holds {keys})"
        )
    for name, tensor in weights.items():
        if tensor.layout == torch.strided and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ConfigError(
                f"{path}: '{name}' has {tensor.numel():,} entries, but fewer are in the file; expected whole tensors"
            )
    within = ".".join(holder)
    others = tuple(name for name in _every(found) if name not in {f"{within}.{each}".lstrip(".") for each in weights})
    return StateDict(weights, within, others)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a safetensors file: {error}") from None


def _pickled(path: Path) -> Any:
    _check_size(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's train.py also saves its arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle may raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}, which is code" if named else "it is no such file"
        raise ConfigError(f"{path}: refused: {reason}; expected a file of tensors and plain values alone") from None


def _check_size(path: Path) -> None:
    """Raise `ConfigError` for an archive that is compressed, or whose pickle is too large. torch does not compress tensors."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [entry.file_size for entry in archive.infolist()]
            pickles = [entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
    except (zipfile.BadZipFile, OSError) as error:
        raise ConfigError(f"{path}: refused: it is a damaged archive ({error})") from None
    if sum(sizes) > path.stat().st_size or max(pickles, default=0) > MAX_PICKLE:
        raise ConfigError(
            f"{path}: refused: it is compressed, and holds {sum(sizes):,} bytes; expected a file that torch wrote"
        )


def _named(path: Path, found: Any, keys: list[str]) -> list[str]:
    """The keys of the file that lead to the mapping called `keys`, joined by dots; a key of the file may contain dots."""
    if not keys:
        return []
    for end in range(len(keys), 0, -1):
        first = ".".join(keys[:end])
        if isinstance(found, dict) and isinstance(found.get(first), dict):
            return [first, *_named(path, found[first], keys[end:])]
    held = ", ".join(map(str, list(found)[:8])) if isinstance(found, dict) else type(found).__name__
    raise ConfigError(f"{path} has no mapping under the key '{'.'.join(keys)}'; it holds {held}")


def _holder(found: Any, depth: int = MAX_NESTING) -> list[str]:
    """The keys that lead to the first holder with tensors; an empty list if no holder has any."""
    if isinstance(found, dict) and depth:
        for name in HOLDERS:
            inner = found.get(name)
            if isinstance(inner, dict) and inner:
                keys = [name, *_holder(inner, depth - 1)]
                held = inner
                for key in keys[1:]:
                    held = held[key]
                if _tensors(held):
                    return keys
    return []


def _tensors(found: Any) -> dict[str, Tensor]:
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _every(found: Any) -> Iterator[str]:
    """Yield, for every tensor in nested mappings and lists, the keys that lead to it, joined by dots."""
    waiting, seen = [("", found, 0)], set[int]()
    while waiting:
        path, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            yield path
        elif isinstance(value, dict | list | tuple) and depth < MAX_NESTING and id(value) not in seen:
            seen.add(id(value))
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            waiting += [(f"{path}.{key}".lstrip("."), item, depth + 1) for key, item in reversed(items)]

"""A store: a directory of raw arrays, which grow while they are written, and the manifest that describes and seals them.

`NAME.bin` holds an array in C order, little-endian, without a header; `manifest.json` holds its dtype, shape and SHA-256, and
whatever else its owner wants to say. Arrays are read as memory maps, so a store may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from dit.errors import DataError, InputError

SPLITS = ("train", "validation")
FORMAT = 1
MANIFEST = "manifest.json"
READ_BYTES = 1 << 22


class StoreWriter:
    """Writes a store by appending: nobody needs to know in advance how many items there will be.

    Each keyword names an array and gives the dtype and shape of one of its items. The directory is created.
    Until `close`, there is no manifest, and the directory is no store.
    """

    def __init__(self, directory: str | Path, **arrays: tuple[DTypeLike, tuple[int, ...]]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._arrays = {name: _Array(self.directory / f"{name}.bin", *spec) for name, spec in arrays.items()}

    def append(self, name: str, batch: np.ndarray) -> None:
        """Add `batch` (B, *item_shape) to the end of an array. Raises `ValueError` for another dtype or item shape."""
        self._arrays[name].append(batch)

    def count(self, name: str) -> int:
        """Items written so far."""
        return self._arrays[name].count

    def close(self, **meta: Any) -> None:
        """Write the manifest: the arrays, then `meta`, which must be JSON."""
        arrays = {name: array.describe() for name, array in self._arrays.items()}
        manifest = {"format": FORMAT, "arrays": arrays, **meta}
        (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n")


class _Array:
    """One growing file and the checksum of what it holds so far."""

    def __init__(self, path: Path, dtype: DTypeLike, item_shape: tuple[int, ...]) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.item_shape = tuple(item_shape)
        self.count = 0
        self.checksum = hashlib.sha256()
        path.write_bytes(b"")

    def append(self, batch: np.ndarray) -> None:
        if batch.dtype != self.dtype or batch.shape[1:] != self.item_shape:
            raise ValueError(
                f"{self.path.name} holds {self.dtype} items of shape {self.item_shape}, not {batch.dtype} {batch.shape[1:]}"
            )
        data = np.ascontiguousarray(batch, self.dtype.newbyteorder("<")).tobytes()
        self.checksum.update(data)
        with self.path.open("ab") as file:
            file.write(data)
        self.count += len(batch)

    def describe(self) -> dict[str, Any]:
        return {"dtype": self.dtype.name, "shape": [self.count, *self.item_shape], "sha256": self.checksum.hexdigest()}


class Store:
    """Reads a store. Raises `DataError` where the directory is no store, or its files do not have the stated size."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.meta = _read_manifest(self.directory / MANIFEST)
        self.arrays = {name: self._map(name, entry) for name, entry in self.meta["arrays"].items()}

    def verify(self) -> None:
        """Read everything once. Raises `DataError` that names the first file whose checksum differs."""
        for name, entry in self.meta["arrays"].items():
            path = self._path(name)
            with path.open("rb") as file:
                found = hashlib.sha256()
                while data := file.read(READ_BYTES):
                    found.update(data)
            if found.hexdigest() != entry["sha256"]:
                raise DataError(f"{path}: its SHA-256 is {found.hexdigest()}, the manifest says {entry['sha256']}")

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def _map(self, name: str, entry: dict[str, Any]) -> np.ndarray:
        path, shape, dtype = self._path(name), tuple(entry["shape"]), np.dtype(entry["dtype"]).newbyteorder("<")
        expected = math.prod(shape) * dtype.itemsize
        if not path.is_file():
            raise DataError(f"{path}: no such file, though {MANIFEST} lists it")
        if (size := path.stat().st_size) != expected:
            raise DataError(f"{path}: {size} bytes, where {MANIFEST} says {expected} (shape {shape}, {dtype.name})")
        if not expected:  # a file of no bytes cannot be mapped
            return np.empty(shape, dtype)
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(path) from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of format {FORMAT}")
    return manifest

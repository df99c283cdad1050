"""A store: a directory of raw arrays, which grow while they are written, and a manifest that describes them with checksums.

`NAME.bin` holds an array in C order, little-endian, without a header. `manifest.json` holds the dtype, shape and SHA-256 of
each array, further data of the writer, and its own SHA-256. Arrays are read as memory maps, so a store may be larger than
memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from dit.checksums import DamagedError, sha256
from dit.errors import DataError, InputError

SPLITS = ("train", "validation")
FORMAT = 2
MANIFEST = "manifest.json"


class StoreWriter:
    """Writes a store by appending, so the number of items need not be known in advance.

    Each keyword names an array, and gives the dtype and shape of one item. The directory is created. `close` writes the
    manifest; without it, the directory is not a store.
    """

    def __init__(self, directory: str | Path, **arrays: tuple[DTypeLike, tuple[int, ...]]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._arrays = {name: _Array(self.directory / f"{name}.bin", *spec) for name, spec in arrays.items()}

    def append(self, name: str, batch: np.ndarray) -> None:
        """Add `batch` (B, *item_shape) to the end of an array. Raises `ValueError` for another dtype or item shape."""
        self._arrays[name].append(batch)

    def count(self, name: str) -> int:
        """The number of items of an array that were written so far."""
        return self._arrays[name].count

    def close(self, **meta: Any) -> None:
        """Write the manifest: the arrays, and `meta`, whose values must be JSON."""
        arrays = {name: array.describe() for name, array in self._arrays.items()}
        manifest = {"format": FORMAT, "arrays": arrays, **meta}
        manifest["sha256"] = _digest(manifest)
        (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n")


class _Array:
    """A file that grows, and the checksum of its bytes so far."""

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
    """Reads a store. Raises `DataError` if the directory is not a store, or a file does not have the size in the manifest.

    `arrays` are memory maps that are not verified; `verified` first compares an array with its checksum.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.meta = _read_manifest(self.directory / MANIFEST)
        self.arrays = {name: self._map(name, entry) for name, entry in self.meta["arrays"].items()}
        self._verified: set[str] = set()

    def verified(self, name: str) -> np.ndarray:
        """The array `name`, after its file was compared with its checksum, once. Raises `DamagedError` if they differ."""
        if name not in self._verified:
            if sha256(self._path(name)) != self.meta["arrays"][name]["sha256"]:
                raise DamagedError(self._path(name), self.directory)
            self._verified.add(name)
        return self.arrays[name]

    def verify(self) -> None:
        """Compare every array with its checksum. Raises `DamagedError` that names the first file whose checksum differs."""
        for name in self.arrays:
            self.verified(name)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def _map(self, name: str, entry: dict[str, Any]) -> np.ndarray:
        path, shape, dtype = self._path(name), tuple(entry["shape"]), np.dtype(entry["dtype"]).newbyteorder("<")
        expected = math.prod(shape) * dtype.itemsize
        if not path.is_file():
            raise DataError(f"{path}: no such file, though {MANIFEST} lists it")
        if (size := path.stat().st_size) != expected:
            raise DataError(f"{path}: {size} bytes, where {MANIFEST} says {expected} (shape {shape}, {dtype.name})")
        if not expected:  # an empty file cannot be mapped
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
    if manifest.pop("sha256", None) != _digest(manifest):
        raise DamagedError(path, path.parent)
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest without its own `sha256`; it does not depend on the layout of the file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()

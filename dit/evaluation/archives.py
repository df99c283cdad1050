"""Many images in one `.npz`, in the format of facebookresearch/DiT `sample_ddp.py` and guided-diffusion's `evaluator.py`.

The file is a zip archive whose member `arr_0.npy` is uint8 (N, H, W, 3). It is written and read one batch at a time, because
50,000 images of 256 x 256 are 9.8 GB.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from dit.errors import DataError

IMAGES = "arr_0"


class ImageArchive:
    """Writes `count` images, given in batches (B, H, W, C) uint8; grey images become RGB. A context manager.

    The file appears only when it is complete: it gets its name after the last image, and is removed after an error.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count, self.written = path, count, 0
        self._partial = path.with_name(f".{path.name}.partial")
        self._shape: tuple[int, ...] = ()
        self._zip: zipfile.ZipFile | None = None
        self._member: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._zip = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)
        self._member = self._zip.open(f"{IMAGES}.npy", "w", force_zip64=True)
        return self

    def write(self, images: np.ndarray) -> None:
        """Add images (B, H, W, C) uint8. Raises `ValueError` for another shape than before, or more than `count` images."""
        if images.dtype != np.uint8 or images.ndim != 4 or self._member is None:
            raise ValueError(f"images of {images.dtype} {images.shape}; expected uint8 (B, H, W, C)")
        if images.shape[3] == 1:
            images = images.repeat(3, axis=3)
        if not self._shape:
            self._shape = images.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self._shape)}
            np.lib.format.write_array_header_1_0(self._member, header)
        if images.shape[1:] != self._shape or self.written + len(images) > self.count:
            raise ValueError(
                f"{self.written} + {len(images)} images of {images.shape[1:]}; expected {self.count} of {self._shape}"
            )
        self._member.write(np.ascontiguousarray(images).data)
        self.written += len(images)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._member is not None
        assert self._zip is not None
        self._member.close()
        self._zip.close()
        if kind is not None or self.written != self.count:
            self._partial.unlink()
            if kind is None:
                raise ValueError(f"{self.written} images were written; {self.count} were announced")
            return
        self._partial.replace(self.path)


class ArchivedImages:
    """The images `arr_0` of an archive: their number, their shape, and all of them in batches. Never reads a pickle."""

    def __init__(self, path: Path, name: str = IMAGES) -> None:
        self.path, self.name = path, name
        with self._open() as member:
            self.shape = self._header(member)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, (B, H, W, 3) uint8 with at most `size` of them."""
        with self._open() as member:
            self._header(member)
            each = int(np.prod(self.shape[1:]))
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                data = member.read(count * each)
                if len(data) < count * each:
                    raise DataError(f"{self.path} ends after {start} of {len(self)} images; it was cut off")
                yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])

    def _open(self) -> IO[bytes]:
        try:
            return zipfile.ZipFile(self.path).open(f"{self.name}.npy")
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file") from None
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise DataError(f"{self.path} has no array {self.name} ({error}); expected an .npz of images") from None

    def _header(self, member: IO[bytes]) -> tuple[int, ...]:
        try:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(member)
        except ValueError as error:
            raise DataError(f"{self.path}: {self.name} is no NumPy array: {error}") from None
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] not in (1, 3):
            raise DataError(f"{self.path}: {self.name} is {dtype} {shape}; expected images, uint8 (N, H, W, 3)")
        return tuple(shape)

"""Decodes pictures to square uint8 images, RGB or grey, or says why it cannot; in one process or many.

This file imports only numpy and Pillow, so that a decoding process starts quickly.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

CHUNK = 16
"""Number of pictures that are sent to a process together; at most 2 * workers + 1 chunks are in flight."""

FORMATS = ("JPEG", "PNG", "WEBP")
"""The formats that are opened, whatever the name of a file. Pillow knows more formats: for PostScript it starts Ghostscript."""

MOST_BYTES = 512 * 1024**2
"""Most bytes of a file. The largest picture that Pillow decodes (2 * 2^30 / 12 pixels) needs less, at 3 bytes a pixel."""

ORIENTATION = 0x0112
"""The EXIF tag that says how to rotate or mirror a picture; CIPA DC-008 (Exif 2.32), section 4.6.4."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation -> the operation that makes the stored pixels upright; Pillow's rotations are counter-clockwise."""

PNG_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
"""The first bytes of a PNG; width, height (4 bytes each) and bit depth (1 byte) follow. W3C PNG, third edition, 5.2, 11.2.1."""

MODES = {1: "L", 3: "RGB"}
"""Channels of an image -> Pillow's mode. `L` is the luma of ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B."""

FAULTS_OF_THE_MACHINE = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Read errors that the machine causes, not the file: they make the stage fail, and a retry may help."""


@dataclass(frozen=True)
class Encoded:
    """One encoded picture, as a file or as bytes, with its name for messages and the index of its class."""

    name: str
    label: int
    data: Path | bytes


@dataclass(frozen=True)
class Sample:
    """One image (size, size, channels) uint8 and the index of its class."""

    image: np.ndarray
    label: int


@dataclass(frozen=True)
class Rejected:
    """One item that is not a usable image: its name, without machine-dependent paths, and what is wrong with it."""

    item: str
    reason: str


def decode_all(pictures: Iterable[Encoded], size: int, workers: int, channels: int = 3) -> Iterator[Sample | Rejected]:
    """Decode in order, in `workers` processes (0: in this one), and read `pictures` only a few chunks ahead of the processes.

    Raises `OSError` if a process was killed, as the system does when memory runs out.
    """
    chunks = _chunks(pictures)
    if workers == 0:
        for chunk in chunks:
            yield from _decode_chunk(chunk, size, channels)
        return
    pending: deque[Future[list[Sample | Rejected]]] = deque()
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for chunk in chunks:
                pending.append(pool.submit(_decode_chunk, chunk, size, channels))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    except BrokenProcessPool:
        raise OSError("a decoding process was killed, perhaps for lack of memory; try fewer images.workers") from None


def decode(data: Path | bytes, size: int, channels: int = 3) -> np.ndarray:
    """The first frame of a picture, upright, cropped and resized to (size, size, channels) uint8: 3 is RGB, 1 is grey.

    Raises the errors of reading and decoding, and `ValueError` for pixels with more than 8 bits per channel.
    """
    with _opened(data) as stream:
        start = stream.read(len(PNG_HEADER) + 9)
        stream.seek(0)
        with Image.open(stream, formats=FORMATS) as image:
            _check_depth(start, image.mode)
            image.load()
            return center_crop(upright(image).convert(MODES[channels]), size)


def is_turned(data: Path | bytes) -> bool:
    """Whether a picture, which can be decoded, has an EXIF orientation by which `upright` rotates or mirrors it."""
    with _opened(data) as stream, Image.open(stream, formats=FORMATS) as image:
        return upright(image) is not image


def upright(image: Image.Image) -> Image.Image:
    """The picture, turned upright by its EXIF or XMP orientation; unchanged if it has no orientation that can be read.

    Pillow's `exif_transpose` also rewrites the EXIF data, so it fails if they are broken in another place.
    """
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken metadata may raise any error, but the pixels can still be good
        return image
    return image if method is None else image.transpose(method)


def _check_depth(start: bytes, mode: str) -> None:
    """Raise `ValueError` for more than 8 bits per channel. For a PNG in colour or with alpha, only its header shows this, not
    Pillow's mode.
    """
    if start.startswith(PNG_HEADER) and start[-1] > 8:
        raise ValueError(f"pixels of {start[-1]} bits per channel: expected at most 8 bits per channel")
    if mode in {"I", "F"} or mode.startswith("I;16"):
        raise ValueError(f"pixels of mode '{mode}': expected at most 8 bits per channel")


@contextmanager
def _opened(data: Path | bytes) -> Iterator[IO[bytes]]:
    """Open bytes, or a regular file of at most `MOST_BYTES`. Raises `ValueError` for anything else, without opening it.

    Opening a named pipe would wait for a writer, and some devices act when they are opened. So the path is checked first, and
    the opened file again, in case it was replaced in between.
    """
    if isinstance(data, bytes):
        yield io.BytesIO(data)
        return
    _check_file(os.stat(data))
    with open(os.open(data, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        _check_file(os.fstat(stream.fileno()))
        yield stream


def _check_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{status.st_size} bytes, more than {MOST_BYTES}")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The central square of an RGB or grey picture at `size` pixels: (size, size, 3 or 1) uint8.

    The method of ADM (Dhariwal & Nichol 2021; `center_crop_arr` of openai/guided-diffusion), which DiT also uses: halve with a
    box filter while the short side is twice `size` or more, scale the short side to `size` with a bicubic filter, and cut out
    the middle.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise ValueError(f"{image.width} x {image.height} pixels is too elongated to be scaled to {size}")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).reshape(height, width, -1)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def _chunks(pictures: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    iterator = iter(pictures)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _decode_chunk(chunk: list[Encoded], size: int, channels: int) -> list[Sample | Rejected]:
    return [decode_or_reject(picture, size, channels) for picture in chunk]


def decode_or_reject(picture: Encoded, size: int, channels: int) -> Sample | Rejected:
    """Decode one picture in this process.

    Decoders raise many types of error for broken files. Each error becomes a `Rejected`, without paths or addresses.
    """
    try:
        return Sample(decode(picture.data, size, channels), picture.label)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = "not a JPEG, PNG or WebP picture"
    except OSError as error:
        if error.errno in FAULTS_OF_THE_MACHINE:
            raise
        reason = error.strerror or str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return Rejected(picture.name, reason)

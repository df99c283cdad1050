"""Encoded pictures to square uint8 images, RGB or grey, or the reason why not; one at a time or in many processes.

Only numpy and Pillow are imported here, so that a decoding process starts quickly.
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
"""Pictures that travel together; at most 2 * workers + 1 chunks are in flight."""

FORMATS = ("JPEG", "PNG", "WEBP")
"""What is opened, whatever a file is called. Pillow knows more: it would start Ghostscript for one that is PostScript."""

MOST_BYTES = 512 * 1024**2
"""More than the largest picture that Pillow decodes (2 * 2^30 / 12 pixels) needs at 3 bytes a pixel."""

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned; CIPA DC-008 (Exif 2.32), section 4.6.4."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation -> what turns the stored pixels upright; Pillow's rotations are counter-clockwise."""

PNG_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
"""How a PNG begins; width, height (4 bytes each) and bit depth (1 byte) follow. W3C PNG (third edition), 5.2 and 11.2.1."""

MODES = {1: "L", 3: "RGB"}
"""Channels of an image -> Pillow's mode. `L` is the luma of ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B."""

FAULTS_OF_THE_MACHINE = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Read errors that do not show that the file is bad: the stage fails, and a retry may help."""


@dataclass(frozen=True)
class Encoded:
    """One picture as a file or as the bytes of one, with the name that messages give it and the index of its class."""

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
    """One item that is no usable image: its name, free of machine-dependent paths, and what is wrong with it."""

    item: str
    reason: str


def decode_all(pictures: Iterable[Encoded], size: int, workers: int, channels: int = 3) -> Iterator[Sample | Rejected]:
    """Decode in order, in `workers` processes (0: in this one), reading `pictures` only as far ahead as keeps them busy.

    Raises `OSError` where a process was killed, as the system does when memory runs out.
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

    Raises whatever reading or decoding raises, and `ValueError` for pixels of more than 8 bits, which bytes cannot hold.
    """
    with _opened(data) as stream:
        start = stream.read(len(PNG_HEADER) + 9)
        stream.seek(0)
        with Image.open(stream, formats=FORMATS) as image:
            _check_depth(start, image.mode)
            image.load()
            return center_crop(upright(image).convert(MODES[channels]), size)


def is_turned(data: Path | bytes) -> bool:
    """Whether a picture that can be decoded is stored lying or mirrored, and its EXIF data says so."""
    with _opened(data) as stream, Image.open(stream, formats=FORMATS) as image:
        return upright(image) is not image


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF or XMP orientation wants it shown; as it is, where they say nothing, or nothing that can be read.

    Pillow's `exif_transpose` also writes the EXIF data anew, and so fails on some that are wrong in other places.
    """
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # parsers of broken metadata raise many types; the pixels are sound all the same
        return image
    return image if method is None else image.transpose(method)


def _check_depth(start: bytes, mode: str) -> None:
    """Refuse more than 8 bits per channel. Of a PNG in colour or with alpha, its header says so, and Pillow's mode does not."""
    if start.startswith(PNG_HEADER) and start[-1] > 8:
        raise ValueError(f"pixels of {start[-1]} bits per channel: expected at most 8 bits per channel")
    if mode in {"I", "F"} or mode.startswith("I;16"):
        raise ValueError(f"pixels of mode '{mode}': expected at most 8 bits per channel")


@contextmanager
def _opened(data: Path | bytes) -> Iterator[IO[bytes]]:
    """Bytes, or a regular file of at most `MOST_BYTES`. Raises `ValueError` for anything else, without waiting for it.

    A named pipe would wait for a writer, and some devices act when they are opened. So they are not opened; the open file is
    looked at again, in case that it was exchanged in between.
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

    The recipe of ADM (Dhariwal & Nichol 2021; `center_crop_arr` of openai/guided-diffusion, which DiT took over): halve with
    a box filter while the short side is twice `size` or more, scale the short side to `size` with a bicubic filter, and cut
    out the middle.
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
    """One picture, decoded here.

    Decoders raise many types for broken files; each is a verdict on the file, in words without paths or addresses.
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

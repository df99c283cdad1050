"""Decoding: a picture is stored as a person sees it, or refused for what bytes cannot hold."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studies import Read

from dit.data.decoding import UPRIGHT, Encoded, Sample, decode, decode_all, upright

TIFF = b"II*\0\x08\0\0\0"
"""The head of EXIF data: little-endian, entries at byte 8."""


def seen() -> Image.Image:
    """A picture without symmetry: top left red, top right green, bottom blue."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24, 0] = pixels[:16, 24:, 1] = pixels[16:, :, 2] = 255
    return Image.fromarray(pixels)


def stored(picture: Image.Image, orientation: int) -> Image.Image:
    """The pixels that a camera stores with that orientation, so that a viewer shows `picture`."""
    back = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}
    method = UPRIGHT.get(orientation)
    return picture if method is None else picture.transpose(back.get(method, method))


def encoded(picture: Image.Image, kind: str, exif: bytes = b"", xmp: bytes = b"") -> bytes:
    file = io.BytesIO()
    quality = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    metadata = {key: value for key, value in (("exif", exif), ("xmp", xmp)) if value}
    picture.save(file, kind, **quality, **metadata)
    return file.getvalue()


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photo_that_lies_on_its_side_is_stored_as_viewers_show_it(orientation: int, kind: str) -> None:
    """huggingface/datasets#6252 and kohya-ss/sd-scripts#1316: orientation in EXIF alone was ignored."""
    found = decode(encoded(stored(seen(), orientation), kind, oriented(orientation)), 32)
    np.testing.assert_allclose(found.astype(int), decode(encoded(seen(), "PNG"), 32), atol=12)


def test_the_first_picture_of_a_phone_that_stores_several_is_turned_too() -> None:
    """hydrusnetwork/hydrus#1442: photos with a depth map or a second size are several JPEG pictures in one file."""
    file = io.BytesIO()
    lying, exif = stored(seen(), 6), Image.Exif()
    exif[0x0112] = 6
    lying.save(file, "MPO", save_all=True, append_images=[lying], exif=exif, quality=95, subsampling=0)
    np.testing.assert_allclose(decode(file.getvalue(), 32).astype(int), decode(encoded(seen(), "PNG"), 32), atol=12)


@pytest.mark.parametrize("tag", ['<rdf:D tiff:Orientation="6"/>', "<rdf:D><tiff:Orientation>6</tiff:Orientation></rdf:D>"])
def test_an_orientation_in_xmp_counts_too(tag: str) -> None:
    """python-pillow/Pillow#4529 and #6462: some programs write the orientation into XMP alone, in one of two spellings."""
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{tag}</x:xmpmeta>'.encode()
    found = decode(encoded(stored(seen(), 6), "JPEG", xmp=xmp), 32)
    np.testing.assert_allclose(found.astype(int), decode(encoded(seen(), "PNG"), 32), atol=12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data larger")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0Exif\0\0" + TIFF,  # python-pillow/Pillow#8348
        b"Exif\0\0" + TIFF + struct.pack("<H", 500),
        b"Exif\0\0",
        oriented(0),  # imageio/imageio#1159: an orientation that does not exist
        oriented(9),
        b"Exif\0\0" + TIFF + struct.pack("<HHHIIHHHI", 2, 0x0112, 2, 3, 0x00414141, 0x0128, 3, 1, 2) + bytes(6),
    ],
)
def test_broken_exif_data_costs_no_picture(exif: bytes) -> None:
    """python-pillow/Pillow#8348: a photo whose EXIF data no parser accepts; viewers show it as it is stored."""
    np.testing.assert_array_equal(decode(encoded(seen(), "JPEG", exif), 32), decode(encoded(seen(), "JPEG"), 32))


def test_an_orientation_beside_a_wrong_value_is_still_applied() -> None:
    """python-pillow/Pillow#8965: `exif_transpose` fails on a rational of -1/0, which has nothing to do with the orientation."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x011A, 5, 1, 38)
    exif = b"Exif\0\0" + TIFF + struct.pack("<H", 2) + entries + bytes(4) + struct.pack("<ii", -1, 0)
    with Image.open(io.BytesIO(encoded(stored(seen(), 6), "JPEG", exif))) as image:
        assert upright(image).size == seen().size


def png16(pixels: np.ndarray, colour: int, interlaced: bool = False) -> bytes:
    """A PNG of 16 bits per channel, which Pillow cannot write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "channels", "colour"),
    [("grey", 1, 0), ("RGB", 3, 2), ("grey with alpha", 2, 4), ("RGBA", 4, 6)],
)
@pytest.mark.parametrize("from_file", [True, False])
def test_png_of_16_bits_is_refused_in_every_colour_type(
    tmp_path: Path, name: str, channels: int, colour: int, from_file: bool
) -> None:
    """python-pillow/Pillow#7723 (RGB) and #4073 (RGBA): opened as if of 8 bits; #3011 (grey): clipped to white."""
    data = png16(np.full((16, 16, channels), 0x12FF, np.uint16), colour)
    (tmp_path / f"{name}.png").write_bytes(data)
    with pytest.raises(ValueError, match="16 bits per channel: expected at most 8 bits per channel"):
        decode(tmp_path / f"{name}.png" if from_file else data, 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_of_up_to_8_bits_is_read_in_every_colour_type(mode: str) -> None:
    picture = seen().convert("L").point(lambda value: 255 * (value > 80)).convert(mode)
    expected = np.asarray(seen().convert("L").point(lambda value: 255 * (value > 80)))[:, 8:40]
    np.testing.assert_array_equal(decode(encoded(picture, "PNG"), 32, channels=1)[..., 0], expected)
    np.testing.assert_array_equal(decode(encoded(picture, "PNG"), 32), np.repeat(expected[..., None], 3, axis=2))


def test_colour_becomes_grey_by_its_luma_and_grey_stays_as_it_is() -> None:
    red, green, blue = 200, 100, 50
    data = encoded(Image.new("RGB", (16, 16), (red, green, blue)), "PNG")
    (sample,) = decode_all([Encoded("x", 0, data)], 16, workers=0, channels=1)
    assert isinstance(sample, Sample)
    assert sample.image.shape == (16, 16, 1)
    np.testing.assert_allclose(sample.image, 0.299 * red + 0.587 * green + 0.114 * blue, atol=1)
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey), "PNG"), 16, channels=1)[..., 0], grey)


def test_every_source_stores_grey_images_where_one_channel_is_asked_for(read: Read) -> None:
    photos = {"kind": "photos", "train_per_class": 1, "validation_per_class": 1, "validation_region": 0.25, "max_zoom": 3.0}
    grey, colour = read(photos, "grey", channels=1), read(photos, "colour")
    assert grey.train_images.shape == (*colour.train_images.shape[:3], 1)
    luma = colour.train_images @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey.train_images[..., 0], luma, atol=1)

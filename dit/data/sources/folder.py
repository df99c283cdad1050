"""Source `folder`: image files in the layout of ImageNet, `root/class/*.{jpg,jpeg,png,webp}`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from dit.data.decoding import Encoded, Rejected, decode_all
from dit.data.sources import Source, Split, hold_out
from dit.errors import DataError
from dit.sections import FolderSource, ImagesParams

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Listing = dict[str, list[str]]
"""Class name -> names of its image files, both sorted."""


def open_source(images: ImagesParams, source: FolderSource) -> Source:
    """List the files; pixels are read later, as a stream.

    Names that begin with a dot, and what stands next to the class folders, are not looked at. Any other entry of a class
    folder is an image file or is rejected. Raises `DataError` for a folder without classes, a class without images, and class
    folders that differ between training and validation.
    """
    train, rejected = _list(source.root, "images.source.root")
    if source.validation_root is None:
        validation_root = source.root
        train, validation = _hold_out(train, source.validation_fraction, images.seed)
    else:
        validation_root = source.validation_root
        validation, more_rejected = _list(validation_root, "images.source.validation_root")
        rejected += more_rejected
        if different := sorted(set(train) ^ set(validation)):
            raise DataError(f"{source.root} and {validation_root} differ in their class folders: {', '.join(different)}")

    def split(root: Path, listing: Listing) -> Split:
        return Split(sum(map(len, listing.values())), decode_all(_files(root, listing), images.size, images.workers))

    return Source(list(train), split(source.root, train), split(validation_root, validation), rejected, notes=[])


def _list(root: Path, key: str) -> tuple[Listing, list[Rejected]]:
    """The image files of each class, and whatever else lies in the class folders."""
    accepted = "accepted: a folder that holds one folder of images for each class"
    if not root.is_dir():
        raise DataError(f"{key} = {root}: no such folder; {accepted}")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{key} = {root}: no class folders in it; {accepted}")
    listing: Listing = {}
    rejected = []
    for name in names:
        files = sorted(file for file in os.listdir(root / name) if not file.startswith("."))
        listing[name] = [file for file in files if file.lower().endswith(SUFFIXES)]
        others = sorted(set(files) - set(listing[name]))
        rejected += [Rejected(_title(root, name, file), f"not one of {', '.join(SUFFIXES)}") for file in others]
    if empty := [name for name in names if not listing[name]]:
        raise DataError(f"{key} = {root}: no images ({', '.join(SUFFIXES)}) for {', '.join(empty)}")
    return listing, rejected


def _hold_out(listing: Listing, fraction: float, seed: int) -> tuple[Listing, Listing]:
    train, validation = {}, {}
    for name, files in listing.items():
        kept, held_out = hold_out(len(files), fraction, seed, name)
        train[name], validation[name] = [files[i] for i in kept], [files[i] for i in held_out]
    return train, validation


def _files(root: Path, listing: Listing) -> Iterator[Encoded]:
    for label, (name, files) in enumerate(listing.items()):
        for file in files:
            yield Encoded(_title(root, name, file), label, root / name / file)


def _title(root: Path, name: str, file: str) -> str:
    """How messages call a file: from the last part of `root` on, so that it does not depend on where the data lies."""
    return PurePath(root.name, name, file).as_posix()

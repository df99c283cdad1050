"""Source `folder`: image files in the layout of ImageNet, `root/class/*.{jpg,jpeg,png,webp}`; `unlabelled`: in any layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath

from dit.data.decoding import Encoded, Rejected, decode_all
from dit.data.sources import UNLABELLED, Source, Split, hold_out
from dit.errors import DataError
from dit.sections import FolderSource, ImagesParams, UnlabelledSource

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Listing = dict[str, list[str]]
"""Class name -> paths of its image files below the root, both sorted."""

ListFiles = Callable[[Path, str], tuple[Listing, list[Rejected]]]
"""A function: (root folder, the key that gives it) -> its image files by class, and its other files as rejected."""


def open_source(images: ImagesParams, source: FolderSource) -> Source:
    """List the files; pixels are read later, as a stream.

    Names that begin with a dot, and files beside the class folders, are ignored. Any other entry of a class folder is an image
    file or is rejected. Raises `DataError` for a folder without classes, a class without images, and class folders that differ
    between training and validation.
    """
    return _open(images, source, _list)


def open_unlabelled(images: ImagesParams, source: UnlabelledSource) -> Source:
    """List the files at any depth below the root, all of one class; pixels are read later, as a stream.

    Names that begin with a dot are ignored, and links to folders are not followed; any other file is an image file or is
    rejected. Raises `DataError` for a folder without images.
    """
    return _open(images, source, _list_unlabelled)


def pictures(images: ImagesParams, source: FolderSource | UnlabelledSource) -> tuple[list[Encoded], list[Encoded]]:
    """List the pictures for training and for validation, without reading them. Raises `DataError` as `open_source` does."""
    train, validation, _ = _listings(images, source, _list_unlabelled if source.kind == "unlabelled" else _list)
    return list(_files(source.root, train)), list(_files(source.validation_root or source.root, validation))


def _listings(
    images: ImagesParams, source: FolderSource | UnlabelledSource, list_files: ListFiles
) -> tuple[Listing, Listing, list[Rejected]]:
    """The image files for training, the image files for validation, and all other files as rejected."""
    train, rejected = list_files(source.root, "images.source.root")
    if source.validation_root is None:
        return *_hold_out(train, source.validation_fraction, images.seed), rejected
    validation, more_rejected = list_files(source.validation_root, "images.source.validation_root")
    if different := sorted(set(train) ^ set(validation)):
        raise DataError(f"{source.root} and {source.validation_root} differ in their class folders: {', '.join(different)}")
    return train, validation, rejected + more_rejected


def _open(images: ImagesParams, source: FolderSource | UnlabelledSource, list_files: ListFiles) -> Source:
    train, validation, rejected = _listings(images, source, list_files)
    validation_root = source.validation_root or source.root

    def split(root: Path, listing: Listing) -> Split:
        stream = decode_all(_files(root, listing), images.size, images.workers, images.channels)
        return Split(tuple(map(len, listing.values())), stream)

    return Source(list(train), split(source.root, train), split(validation_root, validation), rejected, notes=[])


def _list(root: Path, key: str) -> tuple[Listing, list[Rejected]]:
    """The image files of each class, as paths below `root`, and all other entries of the class folders as rejected."""
    if not root.is_dir():
        raise DataError(f"{key} = {root}: no such folder: expected a folder that holds one folder of images for each class")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(
            f"{key} = {root}: no class folders in it: expected one folder of images for each class, "
            "or images.source.kind = 'unlabelled'"
        )
    listing: Listing = {}
    rejected = []
    for name in names:
        files = sorted(file for file in os.listdir(root / name) if not file.startswith("."))
        listing[name], others = _sort_out(root, [f"{name}/{file}" for file in files])
        rejected += others
    if empty := [name for name in names if not listing[name]]:
        raise DataError(f"{key} = {root}: no images ({', '.join(SUFFIXES)}) for {', '.join(empty)}")
    return listing, rejected


def _list_unlabelled(root: Path, key: str) -> tuple[Listing, list[Rejected]]:
    """All image files below `root`, in one class, and all other files as rejected."""
    if not root.is_dir():
        raise DataError(f"{key} = {root}: no such folder: expected a folder of images")
    files: list[str] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        place = Path(folder).relative_to(root)
        files += [(place / name).as_posix() for name in names if not name.startswith(".")]
    images, rejected = _sort_out(root, sorted(files))
    if not images:
        raise DataError(f"{key} = {root}: no images ({', '.join(SUFFIXES)}) in it or below it")
    return {UNLABELLED: images}, rejected


def _sort_out(root: Path, files: Iterable[str]) -> tuple[list[str], list[Rejected]]:
    """The image files among `files`, which are paths below `root`, and all others as rejected."""
    images = [file for file in files if file.lower().endswith(SUFFIXES)]
    others = sorted(set(files) - set(images))
    return images, [Rejected(_title(root, file), f"not one of {', '.join(SUFFIXES)}") for file in others]


def _hold_out(listing: Listing, fraction: float, seed: int) -> tuple[Listing, Listing]:
    train, validation = {}, {}
    for name, files in listing.items():
        kept, held_out = hold_out(len(files), fraction, seed, name)
        train[name], validation[name] = [files[i] for i in kept], [files[i] for i in held_out]
    return train, validation


def _files(root: Path, listing: Listing) -> Iterator[Encoded]:
    for label, files in enumerate(listing.values()):
        for file in files:
            yield Encoded(_title(root, file), label, root / file)


def _title(root: Path, file: str) -> str:
    """The name of a file in messages: its path from the last part of `root` on, so it does not depend on where the data is."""
    return PurePath(root.name, file).as_posix()

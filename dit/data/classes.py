"""How many classes a source of images has, as far as that can be told without reading images."""

from __future__ import annotations

from dit.sections import (
    FolderSource,
    HuggingFaceSource,
    IdxSource,
    ImagesParams,
    PhotosSource,
    UnlabelledSource,
    WebDatasetSource,
)

PUBLISHED = 1000
"""Classes of ImageNet, and so of the published models."""


def num_classes(images: ImagesParams) -> int:
    """The classes of the source, or `PUBLISHED` where only its files tell and are not there."""
    match images.source:
        case PhotosSource():
            from dit.data.sources.photos import PICTURES

            return len(PICTURES)
        case FolderSource(root=root) if root.is_dir():
            return sum(1 for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")) or PUBLISHED
        case IdxSource(class_names=list(names)):
            return len(names)
        case UnlabelledSource() | HuggingFaceSource(label_column=None) | WebDatasetSource(label_key=None):
            return 1
    return PUBLISHED

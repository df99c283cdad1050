"""The number of classes of a source of images, if it can be found without reading images."""

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
"""Number of classes of ImageNet, on which the published models were trained."""


def num_classes(images: ImagesParams) -> int:
    """The number of classes of the source; `PUBLISHED` if it cannot be found without reading images."""
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

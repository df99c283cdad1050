"""Stage `images`: pictures to uint8 images, labels, class names, and a train/validation split."""

from __future__ import annotations

from dit.config import Params
from dit.data.images import write_images
from pipelines.design import Item
from pipelines.files import complete_directory
from pipelines.stages.entry import run_dvc_stage


def images(params: Params, item: Item) -> None:
    """Read the source and write its folder of `data/images`."""
    with complete_directory(item.out) as out:
        counts = write_images(params.images, out)
    print(f"images: {counts['train']} for training, {counts['validation']} for validation, {counts['rejected']} rejected")


if __name__ == "__main__":
    run_dvc_stage(images, "images")

"""Stage `features`: the real validation images in the feature space of the distances."""

from __future__ import annotations

from dit.config import Params
from dit.data.images import load_images
from dit.devices import make_deterministic, resolve_device
from dit.evaluation.distances import check_counts
from dit.evaluation.features import load_extractor, save_features
from pipelines.design import Item
from pipelines.files import complete_directory
from pipelines.stages.entry import run_dvc_stage


def features(params: Params, item: Item) -> None:
    """Measure the validation images and write a folder of `data/features`."""
    settings = params.features
    make_deterministic(settings.threads)
    images = load_images(item.inputs["images"]).validation_images
    check_counts(len(images), params.evaluate)  # here, since every run would fail on it after its training
    extractor = load_extractor(settings, resolve_device(settings.device))
    found = extractor.extract(images, settings.batch_size, "features")
    with complete_directory(item.out) as out:
        save_features(found, extractor, out)
    print(f"features: {extractor.name}, {found.shape[0]} images, {found.shape[1]} features each")


if __name__ == "__main__":
    run_dvc_stage(features, "features")

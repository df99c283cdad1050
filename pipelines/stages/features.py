"""Stage `features`: features of the real validation images, and distances of real, reconstructed and grey images to them."""

from __future__ import annotations

from dit.autoencoder import load_autoencoder
from dit.config import Params
from dit.data.images import load_images
from dit.devices import make_deterministic, resolve_device
from dit.evaluation.counts import check_counts
from dit.evaluation.features import load_extractor, save_features
from dit.evaluation.references import measure
from pipelines.design import Item
from pipelines.files import complete_directory
from pipelines.records.evaluation import ReferencesRecord
from pipelines.stages.entry import run_dvc_stage


def features(params: Params, item: Item) -> None:
    """Measure the validation images and write a folder of `data/features`."""
    settings = params.features
    make_deterministic(settings.threads)
    store = load_images(item.inputs["images"])
    images = store.validation_images
    check_counts(len(images), params.evaluate)  # here, because otherwise every run would fail after its training
    device = resolve_device(settings.device)
    extractor = load_extractor(settings, device)
    found = extractor.extract(images, settings.batch_size, "features")
    autoencoder = load_autoencoder(item.inputs["autoencoder"], device)
    measured = measure(params, store.train_images, found, extractor, autoencoder)
    record = ReferencesRecord(
        count=measured.count,
        dimension=extractor.dimension,
        real=vars(measured.real),
        reconstructions=vars(measured.reconstructions),
        grey=vars(measured.grey),
    )
    with complete_directory(item.out) as out:
        save_features(found, extractor, out)
        record.write(out)
    print(f"features: {extractor.name}, {found.shape[0]} images, {found.shape[1]} features each")


if __name__ == "__main__":
    run_dvc_stage(features, "features")

"""Stage `autoencoder`: train or load an AutoencoderKL, and measure its reconstructions."""

from __future__ import annotations

from dit.autoencoder import make_autoencoder, reconstruction_quality, save, side_by_side
from dit.config import Params
from dit.data.images import load_images
from dit.devices import make_deterministic, resolve_device
from pipelines.design import Item
from pipelines.files import complete_directory, scratch, write_json
from pipelines.stages.entry import run_dvc_stage, run_key


def autoencoder(params: Params, item: Item) -> None:
    """Write a folder of `data/autoencoder`: the model, the quality of its validation reconstructions, and a picture of some."""
    make_deterministic(params.autoencoder.threads)
    images = load_images(item.inputs["images"])
    key = run_key(item, [params.autoencoder.model_dump(mode="json"), resolve_device(params.autoencoder.device).type])
    model = make_autoencoder(params.autoencoder, images.train_images, scratch(key))
    metrics = reconstruction_quality(model, images.validation_images)
    with complete_directory(item.out) as out:
        write_json(out / "metrics.json", metrics)
        side_by_side(model, images.validation_images).save(out / "reconstructions.png")
        save(model, out)
    print(
        f"autoencoder: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f} on {metrics['num_images']} validation images"
    )


if __name__ == "__main__":
    run_dvc_stage(autoencoder, "autoencoder")

"""The commands `dit evaluate` and `dit reference`: figures of published tables. Torch is imported only in a command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dit.errors import ConfigError
from dit.exchange import options as opts
from dit.terminal import plain

if TYPE_CHECKING:
    from dit.evaluation.features import FeatureExtractor
    from dit.evaluation.literature import Figures
    from dit.evaluation.statistics import Statistics

NUM_SAMPLES = 50_000
"""The number of samples behind published tables."""
NEAREST_K = 3
"""Neighbours for precision and recall, as in OpenAI's guided-diffusion `evaluator.py` and in torch-fidelity."""
SIZES = {"inception": 299, "efficientnet_lite0": 128}
LABELS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
}

Extractor = Annotated[
    str | None, typer.Option(help="Feature network: inception or efficientnet_lite0 (default: the study's, or inception).")
]
FeatureWeights = Annotated[
    Path | None,
    typer.Option("--feature-weights", help="A local file with torch-fidelity's weights of Inception (default: download them)."),
]


def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="What `dit sample` takes, or existing images: an .npz, or a folder of pictures."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="A file of statistics (from guided-diffusion or `dit reference`), or a folder of pictures."),
    ] = None,
    checkpoint: opts.Checkpoint = None,
    model: opts.Model = None,
    vae: opts.Vae = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            "--num-samples",
            "--num-fid-samples",
            min=2,
            help="How many samples to measure (default: 50000, or all existing images).",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the samples to this .npz file.")] = None,
    extractor: Extractor = None,
    feature_weights: FeatureWeights = None,
    nearest_k: Annotated[int, typer.Option(min=1, help="How many nearest neighbours precision and recall use.")] = NEAREST_K,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    scheduler: opts.Scheduler = None,
    steps: opts.Steps = None,
    timestep_spacing: opts.Spacing = None,
    guidance_scale: opts.Guidance = None,
    guidance_channels: opts.GuidanceChannels = None,
    seed: opts.Seed = None,
    batch_size: opts.BatchSize = None,
    precision: opts.Precision = None,
    device: opts.Device = None,
    key: opts.Key = "",
    step: opts.Step = None,
    latents: opts.Latents = None,
    autoencoder: opts.Autoencoder = None,
    scratch: opts.Scratch = Path(".scratch"),
    params: opts.ParamsFile = Path("params.yaml"),
) -> None:
    """Measure FID, sFID, Inception score, precision and recall of samples against a reference, as in published tables.

    Samples are drawn, decoded and measured one batch at a time. Every figure is printed with its reference, the number of
    samples and the number of reference images, because figures of different numbers of images cannot be compared.
    """
    from dit.devices import make_deterministic, resolve_device
    from dit.distributed import joined
    from dit.evaluation.literature import compare
    from dit.evaluation.pictures import first, open_pictures
    from dit.evaluation.statistics import measure
    from dit.exchange.drawing import PUBLISHED, check_output, images, kept, labels_for, settings_for
    from dit.exchange.trained import Where, is_images, load

    if reference is None:
        raise ConfigError("no --reference; expected statistics (.npz, .safetensors), or a folder of pictures")
    if output is not None:
        check_output(output, archive=True)
    chosen = opts.one(target, checkpoint)
    where = Where.of(model, vae, key, step, latents, autoencoder, scratch)
    size = batch_size or PUBLISHED["batch_size"]
    with joined(resolve_device(device or "auto")) as ranks:
        network = _extractor(extractor, feature_weights, params, size, ranks.device.type)
        against = _reference(reference, network, size)
        if is_images(Path(chosen)):
            pictures = first(open_pictures(Path(chosen)), num_samples)
            name, count, batches, drawn = pictures.name, pictures.count, pictures.batches(size), "as they are"
        else:
            trained = load(chosen, where)
            given = opts.given(
                scheduler=scheduler,
                steps=steps,
                timestep_spacing=timestep_spacing,
                guidance_scale=guidance_scale,
                guidance_channels=guidance_channels,
                seed=seed,
                batch_size=batch_size,
                precision=precision,
                device=device,
                num_samples=num_samples or NUM_SAMPLES,
            )
            settings = settings_for(trained, opts.study(trained.about, params), given)
            make_deterministic(settings.threads)
            name, count, drawn = trained.name, settings.num_samples, opts.words(settings)
            batches = images(trained, labels_for(trained, count, None), settings, ranks)
        if not ranks.is_main:
            for _ in batches:
                pass
            return
        found = measure(name, kept(batches, count, output) if output else batches, count, network)
    figures = compare(found, against, nearest_k)
    _print(found, against, figures, network, drawn, nearest_k, as_json)


def reference(
    source: Annotated[
        Path, typer.Argument(help="Images: data/images of a study, an .npz with arr_0, or a folder of pictures.")
    ],
    output: Annotated[Path, typer.Argument(help="A new file, .safetensors or .npz.")],
    split: Annotated[str, typer.Option(help="Which split of data/images: train or validation.")] = "train",
    size: Annotated[
        int | None, typer.Option(min=8, help="Crop and scale pictures to this size (default: the size of the first one).")
    ] = None,
    num_images: Annotated[int | None, typer.Option(min=2, help="Use only the first so many images (default: all).")] = None,
    features: Annotated[bool, typer.Option(help="Keep the features of each image: precision and recall need them.")] = True,
    extractor: Extractor = None,
    feature_weights: FeatureWeights = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    device: opts.Device = None,
    params: opts.ParamsFile = Path("params.yaml"),
) -> None:
    """Make reference statistics for `dit evaluate` from your own images: mean and covariance of their features."""
    from dit.evaluation.pictures import first, open_pictures
    from dit.evaluation.statistics import measure, save

    if split not in ("train", "validation"):
        raise ConfigError(f"--split {split}; expected train or validation")
    if output.suffix not in (".safetensors", ".npz") or output.exists():
        raise ConfigError(f"{output}: expected a new file that ends in .safetensors or .npz")
    which: Literal["train", "validation"] = "train" if split == "train" else "validation"
    pictures = first(open_pictures(source, size, which), num_images)
    network = _extractor(extractor, feature_weights, params, batch_size, device or "auto")
    found = measure(pictures.name, pictures.batches(batch_size), pictures.count, network)
    save(found, output, features)
    print(f"{output}: {found.count} images of {plain(pictures.name)}, {network.name} at {network.size} pixels")


def _extractor(name: str | None, weights: Path | None, params: Path, batch_size: int, device: str) -> FeatureExtractor:
    """The feature network called `name`, or else the study's if there is a parameter file, or else Inception."""
    from pydantic import ValidationError

    from dit import config
    from dit.devices import resolve_device
    from dit.errors import explain
    from dit.evaluation.features import load_extractor
    from dit.sections import FeaturesParams

    own: dict[str, Any] = {}
    if params.is_file() and name is None:
        own = config.load(params).features.model_dump()
    chosen = name or own.get("extractor", "inception")
    data = {
        "size": SIZES.get(chosen, 299),
        "weights": None,
        "threads": 2,
        **own,
        "extractor": chosen,
        "batch_size": batch_size,
        "device": device,
    }
    if weights is not None:
        data["weights"] = weights
    try:
        settings = FeaturesParams.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, "options", data)) from None
    return load_extractor(settings, resolve_device(device))


def _reference(path: Path, network: FeatureExtractor, batch_size: int) -> Statistics:
    """Statistics from the file `path`, or of the images at `path`."""
    from dit.evaluation.pictures import open_pictures
    from dit.evaluation.statistics import has_statistics, load, measure, with_features_of_images

    if path.is_dir() or not has_statistics(path):
        pictures = open_pictures(path)
        return measure(pictures.name, pictures.batches(batch_size), pictures.count, network)
    return with_features_of_images(load(path, network), path, network, batch_size)


def _print(
    found: Statistics,
    against: Statistics,
    figures: Figures,
    network: FeatureExtractor,
    drawn: str,
    nearest_k: int,
    as_json: bool,
) -> None:
    counted = {"generated": found.count, "reference": against.count}
    if as_json:
        about = {"samples": found.name, "reference": against.name, "images": counted, "extractor": network.name}
        print(json.dumps({**about, "drawn": drawn, "nearest_k": nearest_k, "figures": vars(figures)}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title=f"{plain(found.name)} against {plain(against.name)}", title_justify="left")
    table.columns[1].justify = "right"
    for name, value in vars(figures).items():
        table.add_row(LABELS[name], "-" if value is None else f"{value:.4f}")
    of = "an unknown number of" if against.count is None else f"{against.count:,}"
    single = "" if against.features is None else f"; precision and recall use {len(against.features):,} of them"
    Console(markup=False, emoji=False).print(table)
    print(
        f"{found.count:,} images ({drawn}) against {of} images{single}; {network.name} at {network.size} pixels; "
        f"k = {nearest_k}"
    )
    for line in _cautions(found, against, figures, network):
        print(line)


def _cautions(found: Statistics, against: Statistics, figures: Figures, network: FeatureExtractor) -> Iterator[str]:
    if found.count is not None and found.count < network.dimension:
        yield f"{found.count:,} images are fewer than the {network.dimension} features: this FID does not compare with others."
    if figures.precision is None:
        yield f"No precision and recall: {plain(against.name)} has neither images nor their features."
    if figures.sfid is None:
        lacking = (
            "the reference has no mu_s and sigma_s" if found.spatial is not None else f"{network.name} has no such features"
        )
        yield f"No sFID: {lacking}."

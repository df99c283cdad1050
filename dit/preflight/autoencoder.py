"""A pretrained autoencoder: its class, channels, weights, and the scale of its latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dit.config import Params
from dit.errors import UserError
from dit.preflight.deadline import within
from dit.preflight.finding import Finding, of_error
from dit.preflight.subject import Subject
from dit.sections import PretrainedAutoencoder

WHAT = "autoencoder"
ANSWER_SECONDS = 10.0
"""How long the hub may take to answer."""


def check(subject: Subject) -> Iterator[Finding]:
    """Open the pretrained autoencoder of every setting, and check that its latents can be normalised as the parameters ask."""
    if not subject.runs("autoencoder"):
        return
    for params in subject.distinct("autoencoder", "latents", "images"):
        if isinstance(params.autoencoder, PretrainedAutoencoder):
            where = f"autoencoder.path = {params.autoencoder.path}"
            try:
                yield from _open(params, params.autoencoder, where)
            except (UserError, ConnectionError) as error:
                yield of_error(WHAT, where, error)


def _open(params: Params, autoencoder: PretrainedAutoencoder, where: str) -> Iterator[Finding]:
    """Load a local directory; for an autoencoder on the hub, fetch only its configuration."""
    from dit.autoencoder.published import load_pretrained, normalization, read_config  # imports diffusers
    from dit.data.latents import stated_normalization

    channels = params.images.channels
    config = within(ANSWER_SECONDS, f"{where}: the hub", lambda: read_config(autoencoder, channels))
    if Path(autoencoder.path).is_dir():
        load_pretrained(autoencoder, channels)
    stated = stated_normalization(params.latents.normalize, autoencoder.latent_channels, normalization(config))
    scale = f"latents normalised by {stated['source']}" if stated else "latents normalised by what is measured"
    yield Finding(WHAT, where, f"{config['_class_name']}, {autoencoder.latent_channels} latent channels, {scale}")

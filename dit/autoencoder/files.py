"""Autoencoders in diffusers format: what stage `autoencoder` leaves behind, and how any directory is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dit import checksums
from dit.autoencoder.kinds import CLASSES, Autoencoder, Pixels
from dit.errors import DataError, InputError

MODEL = "model"


def load_autoencoder(directory: str | Path, device: torch.device | str) -> Autoencoder:
    """What stage `autoencoder` left in `directory`: float32, in eval mode, without gradients, on `device`.

    Raises `InputError` where the directory holds no autoencoder, or a file has changed since it was written, `DataError` where
    its weights do not fit.
    """
    model = Path(directory) / MODEL
    if not (model / "config.json").is_file():
        raise InputError(model / "config.json")
    checksums.verify(model)
    config = json.loads((model / "config.json").read_text())
    if config["_class_name"] == Pixels.__name__:
        return Pixels(config["latent_channels"]).to(device)
    return from_pretrained(config["_class_name"], str(model)).to(device)


def from_pretrained(class_name: str, path: str, **where: Any) -> Autoencoder:
    """Safetensors only. Raises `DataError` where the weights are not exactly those of the configured network."""
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "torch_dtype": torch.float32, "output_loading_info": True}
    autoencoder, loading = CLASSES[class_name].from_pretrained(path, **where, **options)
    if wrong := {kind: names for kind, names in loading.items() if names}:
        raise DataError(f"the weights of '{path}' do not fit its config.json: {wrong}")
    return autoencoder.eval().requires_grad_(False)


def save(autoencoder: Autoencoder, directory: Path) -> None:
    """Write diffusers format into `directory/model`, without a trace of where the weights came from."""
    if isinstance(autoencoder, Pixels):
        (directory / MODEL).mkdir(parents=True)
        (directory / MODEL / "config.json").write_text(json.dumps(autoencoder.config, indent=2) + "\n")
        return
    autoencoder.register_to_config(_name_or_path="")
    autoencoder.to("cpu").save_pretrained(directory / MODEL)

"""Reads and writes autoencoders in diffusers format, such as the output of stage `autoencoder`."""

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
    """The autoencoder that stage `autoencoder` wrote to `directory`: float32, in eval mode, without gradients, on `device`.

    Raises `InputError` if the directory holds no autoencoder, or if a file has changed since it was written, and `DataError` if
    the weights do not fit.
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
    """Load an autoencoder; its weights must be safetensors. Raises `DataError` if they do not fit the network of its config."""
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "torch_dtype": torch.float32, "output_loading_info": True}
    autoencoder, loading = CLASSES[class_name].from_pretrained(path, **where, **options)
    if wrong := {kind: names for kind, names in loading.items() if names}:
        raise DataError(f"the weights of '{path}' do not fit its config.json: {wrong}")
    return autoencoder.eval().requires_grad_(False)


def save(autoencoder: Autoencoder, directory: Path) -> None:
    """Write `autoencoder` in diffusers format to `directory/model`, without the path that its weights came from."""
    if isinstance(autoencoder, Pixels):
        (directory / MODEL).mkdir(parents=True)
        (directory / MODEL / "config.json").write_text(json.dumps(autoencoder.config, indent=2) + "\n")
        return
    autoencoder.register_to_config(_name_or_path="")
    autoencoder.to("cpu").save_pretrained(directory / MODEL)

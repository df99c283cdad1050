"""Read a directory that `save_pretrained` of diffusers wrote, as its `from_pretrained` does, without executing anything.

The class is the one to which diffusers resolves the configuration. The weights are in the files that the index names, or else
in the file with the standard name; if a variant is given, only its files count (diffusers, models/modeling_utils.py,
`from_pretrained`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dit.audit.files import FACTORY, Reading, Weights, named
from dit.errors import ConfigError, DataError
from dit.init.weights import StateDict, state_dict
from dit.models.external.sources import diffusers_class

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""How names of weight files begin: in diffusers, and in what accelerate and transformers write."""

SUFFIXES = (".safetensors", ".bin")
"""Suffixes of weight files, in the order of preference; of a `.bin`, only tensors and plain values are read."""

MAX_JSON = 4 * 2**20
"""The largest size in bytes of a configuration or an index."""

FOLDERS = ("transformer", "unet", "prior")
"""Folders in which a pipeline keeps the network that denoises."""


def network_folder(path: Path) -> Path:
    """The folder of the network: `path` itself, or the network's folder if `path` is a whole pipeline."""
    if (path / "config.json").is_file():
        return path
    return next((path / name for name in FOLDERS if (path / name / "config.json").is_file()), path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ConfigError`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size > MAX_JSON:
        raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; expected a JSON object of at most {MAX_JSON:,}")
    return parse_json(path.read_bytes().decode(errors="replace"), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object from text. Raises `ConfigError`, which says `where` the text stands."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ConfigError(f"{where}: the JSON is nested too deep; expected constructor arguments") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {type(found).__name__}; expected a JSON object of constructor arguments")
    return found


def constructor_of(config: Mapping[str, Any], where: Path) -> tuple[type[nn.Module], dict[str, Any], tuple[str, ...]]:
    """The class that diffusers would build from a configuration, its arguments, and the keys that the class ignores."""
    name = config.get("_class_name")
    if "auto_map" in config:
        raise ConfigError(f"{where}: its class is in code beside it (auto_map), which is not executed; {FACTORY}")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where} has no _class_name; expected a directory that diffusers' save_pretrained wrote; {FACTORY}")
    constructor = diffusers_class(_remapped(name, config))
    arguments, unused, _ = constructor.extract_init_dict(dict(config))  # type: ignore[attr-defined]
    return constructor, arguments, tuple(key for key in unused if not key.startswith("_"))


def _remapped(name: str, config: Mapping[str, Any]) -> str:
    """The class that replaces the legacy class `name` for this configuration, as in `LegacyModelMixin` of diffusers."""
    from diffusers.models.model_loading_utils import _CLASS_REMAPPING_DICT

    norm = config.get("norm_type")
    return _CLASS_REMAPPING_DICT.get(name, {}).get(norm, name) if isinstance(norm, str) else name


def read_directory(path: Path, reading: Reading, anchors: tuple[str, ...] = ()) -> Weights:
    """The weights that `from_pretrained` would read. Raises `DataError` where there are none."""
    files, index = _weight_files(path, reading.variant)
    tensors: dict[str, Any] = {}
    for file in files:
        part = state_dict(file, reading.key)
        if twice := sorted(part.weights.keys() & tensors.keys()):
            raise DataError(f"{file}: '{twice[0]}' is in another file of {path} too; expected each tensor once")
        tensors |= part.weights
    found = named(StateDict(tensors, "", ()), tuple(files), anchors, reading)
    used = {file.name for file in files} | ({index.name} if index else set())
    others = [each.name for each in sorted(path.iterdir()) if each.name not in used and _is_weights(each)]
    return Weights(found.tensors, found.files, "", found.prefix, found.ignored, tuple(others))


def _is_weights(path: Path) -> bool:
    return path.name.endswith((*SUFFIXES, ".index.json", ".pt", ".pth", ".ckpt", ".msgpack", ".gguf"))


def _weight_files(path: Path, variant: str) -> tuple[list[Path], Path | None]:
    """The files of one set of weights, and the index that names them."""
    between = f".{variant}" if variant else ""
    for stem in STEMS:
        for suffix in SUFFIXES:
            for index in (path / f"{stem}{suffix}.index{between}.json", path / f"{stem}{suffix}{between}.index.json"):
                if index.is_file():
                    return _indexed(index), index
            if (path / f"{stem}{between}{suffix}").is_file():
                return [path / f"{stem}{between}{suffix}"], None
    held = ", ".join(each.name for each in sorted(path.iterdir()) if _is_weights(each)) or "no weights"
    wanted = f"{STEMS[0]}{between}.safetensors"
    raise DataError(
        f"{path} holds {held}; expected {wanted}, or its shards and index, or .bin; a variant is chosen with --variant"
    )


def _indexed(index: Path) -> list[Path]:
    """The files that an index names; all must be in the folder of the index."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f"{index} has no weight_map; expected the index that save_pretrained writes beside shards")
    files = [index.parent / name for name in dict.fromkeys(names.values())]
    for file in files:
        if file.parent != index.parent or file.name in ("", "..", "."):
            raise DataError(f"{index} names {file}; expected files beside it")
        if not file.is_file():
            raise DataError(f"{file}: no such file, but {index.name} names it")
    return files

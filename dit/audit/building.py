"""Build networks from other people's configurations: one that cannot be built is refused before it takes time or memory."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from dit.errors import ConfigError
from dit.models.external.sources import built

MAX_NUMBER = 2**40
"""The largest number in a configuration."""

MAX_CHANNELS = 2**13
"""The most channels of a sample, and the largest number in a list: lists hold widths, or numbers of positions per side."""

MAX_DEPTH = 32
"""How deep lists and mappings may be nested in a configuration."""

MAX_ENTRIES = 100_000
"""The most values in a configuration."""

MAX_SIDE = 512
"""The most positions along a side of a sample or of a position table: such a table is computed even on the meta device."""

MAX_LAYERS = 256
"""The most blocks of a network."""

MAX_MODULES = 10_000
"""The most modules of a network: 256 blocks of about forty modules."""

SIDES = ("sample_size", "sample_width", "sample_height", "pos_embed_max_size", "sample_frames", "image_size", "input_size")

LAYERS = re.compile(r"(n|num)_?(\w+_)?(layers|blocks)|(\w+_)?depth")
"""Names of arguments that set the number of blocks."""

WEIGHT_COPIES = 3
"""How many copies of the weights an audit holds, in their own precision: the network, its copy, and the copy's start."""


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a configuration is nested too deep, is too long, or has numbers that are too large."""
    for count, (path, value, depth) in enumerate(_values(config)):
        if depth > MAX_DEPTH or count > MAX_ENTRIES:
            raise ConfigError(f"--config of {name}: nested deeper than {MAX_DEPTH}, or more than {MAX_ENTRIES:,} values")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        shown = path[1:].removesuffix("[]")
        if number and (not math.isfinite(value) or abs(value) > MAX_NUMBER):
            raise ConfigError(f"--config of {name}: {shown} is no size of a network; expected at most 2^40")
        most = MAX_SIDE if shown in SIDES else MAX_LAYERS if LAYERS.fullmatch(shown) else MAX_NUMBER
        if path.endswith("[]") or shown.endswith("channels"):
            most = min(most, MAX_CHANNELS)
        if number and value > most:
            raise ConfigError(f"--config of {name}: {shown} = {value}; expected at most {most}")


def _values(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any, int]]:
    yield path, value, depth
    if depth > MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _values(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _values(item, path if path.endswith("[]") else f"{path}[]", depth + 1)


def made(constructor: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Call `constructor` with `arguments`, first on the meta device, so that a network that is too large is refused.

    Raises `ConfigError` for a network that cannot be built, has too many modules, or does not fit in memory.
    """
    with _limited(constructor.__name__), torch.device("meta"), warnings.catch_warnings(action="ignore"):
        try:
            outline = constructor(**arguments)
        except ConfigError:
            raise
        except Exception:  # some networks cannot be built on the meta device; other errors come up again below
            outline = None
    if outline is not None:
        need = WEIGHT_COPIES * sum(weight.numel() * weight.element_size() for weight in outline.parameters())
        free = psutil.virtual_memory().available
        if need > free:
            raise ConfigError(
                f"{constructor.__name__} needs {need / 2**30:,.0f} GiB to be audited, and {free / 2**30:,.0f} GiB are free; "
                "make it smaller with --config"
            )
    with _limited(constructor.__name__), warnings.catch_warnings(action="ignore"):
        network = built(constructor, arguments, "--config")
    if not any(True for _ in network.parameters()):
        raise ConfigError(f"{constructor.__name__} has no weights with these arguments; expected a network")
    return network


@contextmanager
def _limited(name: str) -> Iterator[None]:
    """Within the block, a network of too many modules, or with a weight larger than the memory, is refused."""
    modules = 0
    memory = psutil.virtual_memory().total

    def count(_: nn.Module, __: str, ___: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > MAX_MODULES:
            raise ConfigError(
                f"{name} has more than {MAX_MODULES:,} modules with these arguments; make it smaller with --config"
            )

    def measure(_: nn.Module, attribute: str, weight: nn.Parameter | None) -> None:
        if weight is not None and weight.numel() * weight.element_size() > memory:
            raise ConfigError(f"{name}: weight {attribute} {tuple(weight.shape)} is larger than the memory; make it smaller")

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(measure)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

"""How many images the distances need; apart from them, since to compare numbers nothing has to be imported that measures."""

from __future__ import annotations

from dit.errors import ConfigError
from dit.sections import EvaluateParams


def check_counts(num_real: int, params: EvaluateParams) -> None:
    """Raise the `ConfigError` that `sample_distances` would raise for too few real images, before anything is generated."""
    check_count("kernel_subset_size", params.kernel_subset_size, num_real, "real")
    check_count("nearest_k", params.nearest_k, num_real - 2, "real")


def check_count(key: str, value: int, most: int, kind: str) -> None:
    """Raise `ConfigError` where the value of `evaluate.KEY` is more than there are images for."""
    if value > most:
        raise ConfigError(f"evaluate.{key} = {value}; it should be at most {most}, with the {kind} images that there are")

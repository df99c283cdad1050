"""How many images the distances need. A module of its own, so that checking numbers does not import the metrics."""

from __future__ import annotations

from dit.errors import ConfigError
from dit.sections import EvaluateParams


def check_counts(num_real: int, params: EvaluateParams) -> None:
    """Raise the `ConfigError` that `sample_distances` would raise for too few real images, before anything is generated."""
    check_count("kernel_subset_size", params.kernel_subset_size, num_real, "real")
    check_count("nearest_k", params.nearest_k, num_real - 2, "real")


def check_count(key: str, value: int, most: int, kind: str) -> None:
    """Raise `ConfigError` if the value of `evaluate.KEY` is larger than `most`, which the number of images allows."""
    if value > most:
        raise ConfigError(f"evaluate.{key} = {value}; it should be at most {most}, with the {kind} images that there are")

"""How networks of diffusers are built for a study and called; tables describe the conventions of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from dit.errors import ConfigError
from dit.models.external.network import Made
from dit.models.external.sources import Maker, built, check_arguments, diffusers_class

SIZES: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "sample_size": lambda study: study["latent_size"],
    "in_channels": lambda study: study["latent_channels"],
    "out_channels": lambda study: study["latent_channels"] * (2 if study["learn_sigma"] else 1),
}
"""Arguments that follow from the study, for constructors that have them."""

CLASSES: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "num_embeds_ada_norm": lambda study: study["num_classes"],
    "num_class_embeds": lambda study: study["num_classes"] + 1,
}
"""The argument that sets the number of classes. Class `num_classes`, the null class, must have an embedding too.

With `num_embeds_ada_norm`, `CombinedTimestepLabelEmbeddings` adds the row of the null class itself, as it drops labels. With
`num_class_embeds`, an `nn.Embedding` has exactly this many rows. Source: diffusers 0.42.1, models/embeddings.py,
unets/unet_2d.py.
"""

CALL = {"x": ("hidden_states", "sample"), "t": ("timestep",), "y": ("class_labels",)}
"""The names that arguments of `forward` may have for the noisy latents x, the timesteps t and the labels y."""

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

DROPOUT = "dropout_prob"
"""The attribute with the probability that a label embedder of diffusers drops a label in training. It is set to 0, because here
labels are dropped when a batch is made.
"""


def maker(name: str, arguments: Mapping[str, Any], study: Mapping[str, Any]) -> Maker:
    """A function that builds the class `name` with `arguments` and the arguments that follow from the study.

    Raises `ConfigError` if diffusers has no such class, if it is not class-conditional, or if it does not take the arguments.
    """
    found = diffusers_class(name)
    where = f"diffusers:{name}"
    names = _call(found, where)
    parameters = inspect.signature(found).parameters
    follows = {key: size(study) for key, size in (SIZES | CLASSES).items() if key in parameters}
    if not follows.keys() & CLASSES.keys():
        raise ConfigError(f"{where} is not class-conditional: its constructor has none of {', '.join(CLASSES)}")
    check_arguments(where, found, arguments, follows)
    return partial(_made, found, {**follows, **arguments}, names)


def _call(found: type[nn.Module], where: str) -> tuple[str, str, str]:
    """The names of the arguments x, t and y of `forward`. Raises `ConfigError` if one is missing or others are required."""
    parameters = inspect.signature(found.forward).parameters
    given = {part: name for part, known in CALL.items() for name in known if name in parameters}
    lacking = [" or ".join(known) for part, known in CALL.items() if part not in given]
    required = [name for name, each in parameters.items() if each.default is each.empty and each.kind in NAMED]
    others = [name for name in required[1:] if name not in given.values()]
    if lacking or others:
        reasons = [f"its forward has no {name}" for name in lacking] + [f"its forward also needs {name}" for name in others]
        raise ConfigError(
            f"{where} is not a class-conditional network of latents: {'; '.join(reasons)}; "
            "expected one such as DiTTransformer2DModel or UNet2DModel, or your own package.module:factory around it"
        )
    return given["x"], given["t"], given["y"]


def _made(found: type[nn.Module], arguments: Mapping[str, Any], names: tuple[str, str, str]) -> Made:
    network = built(found, arguments, "model.arguments")
    for module in network.modules():
        if hasattr(module, "embedding_table") and hasattr(module, DROPOUT):
            setattr(module, DROPOUT, 0.0)
    return network, names

"""The network, and the checkpoints from which strategies of the study take weights: every name and shape is checked."""

from __future__ import annotations

from collections.abc import Iterator

from dit import models
from dit.config import Params
from dit.errors import ConfigError
from dit.init import weights
from dit.init.rules import FromCheckpoint
from dit.init.strategy import claims
from dit.preflight.finding import Finding, of_error
from dit.preflight.subject import Subject

WHAT = "model"


def check(subject: Subject) -> Iterator[Finding]:
    """Build the network of every setting on the meta device, and look for its weights in the files that strategies name."""
    if not subject.runs("analyse", "train"):
        return
    for params in subject.distinct("model", "images", "autoencoder", "diffusion"):
        count = sum(weight.numel() for weight in params.own_skeleton.parameters() if weight.requires_grad)
        size = f"{params.autoencoder.latent_channels} x {params.latent_size} x {params.latent_size}"
        yield Finding(WHAT, f"model.name = {params.model.name}", f"{count:,} weights, on latents of {size}")
        counts = subject.counts_of(params)
        for name in params.study.strategies:
            if any(isinstance(rule, FromCheckpoint) for rule in params.strategies[name].rules):
                yield from _strategy(params, name, len(counts.train) if counts else None)
    weights.forget()


def _strategy(params: Params, name: str, classes: int | None) -> Iterator[Finding]:
    """Check the weights that one strategy takes from files; shapes that depend on an unknown number of classes are skipped."""
    every_role = models.roles(params.skeleton(num_classes=classes or 1))
    shapes = {} if classes else {role.parameter: role.shape for role in models.roles(params.skeleton(num_classes=2))}
    claimed = claims(params.strategies[name], every_role)
    for index, rule in enumerate(params.strategies[name].rules):
        if not isinstance(rule, FromCheckpoint):
            continue
        where = f"strategies.{name}.rules[{index}].path = {rule.path}"
        wanted = [
            role for role, chosen in claimed.items() if chosen is rule and role.shape == shapes.get(role.parameter, role.shape)
        ]
        try:
            rule.verify()
        except ConfigError as error:
            yield of_error(WHAT, where, error)
            continue
        wrong = []
        for role in wanted:
            try:
                rule.values(role)
            except ConfigError as error:
                wrong.append(str(error).removeprefix(f"{rule.path}: "))
        if wrong:
            others = f" ({len(wrong)} of {len(wanted)} roles are not as expected)" if len(wrong) > 1 else ""
            yield Finding(WHAT, where, f"{wrong[0]}{others}", "the names and shapes of this network", "error")
        else:
            tensors = {role.parameter for role in wanted}
            yield Finding(WHAT, where, f"has the {len(tensors)} tensors that {name} takes from it")

"""One training run: from arrays or a store of latents to a trained model, and what was measured during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch

from dit import config, init
from dit.api.latents import Labels, Latents, write_store
from dit.api.model import Model, ModelConfig
from dit.config import Params
from dit.data.latents import LatentStore
from dit.devices import make_deterministic, resolve_device
from dit.diffusion import Diffusion
from dit.errors import ConfigError, DataError, did_you_mean
from dit.init.strategy import Strategy
from dit.sections import SCHEDULERS
from dit.training.loop import Trainer
from dit.training.records import TABLES, Outcome, Records

OWN = "given"
"""The name of a strategy that the caller gave as rules, not by name."""


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    `model` has the averaged weights (EMA). `history` has a row for each step with a validation: `step`, the error
    `validation_mse` of the weights without averaging, and the error `ema_validation_mse` of the averaged ones. `outcome` says
    whether the run finished, collapsed or diverged; a collapse or divergence raises no error.
    `dit.training.records.Records` describes the tables `losses`, `diagnostics`, `stability` and `events`.
    """

    strategy: str
    seed: int
    params: Params = field(repr=False)
    model: Model = field(repr=False)
    outcome: Outcome
    history: pd.DataFrame = field(repr=False)
    losses: pd.DataFrame = field(repr=False)
    diagnostics: pd.DataFrame = field(repr=False)
    stability: pd.DataFrame = field(repr=False)
    events: pd.DataFrame = field(repr=False)


def train(
    model: str,
    latents: Latents,
    labels: Labels | None = None,
    *,
    strategy: str | Mapping[str, Any] | Strategy = "adaln_zero",
    seed: int = 0,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    validation: tuple[Any, Labels] | None = None,
    num_classes: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Train the network called `model`, such as `"DiT-S/2"`, from the initialisation `strategy`.

    `latents` (N, C, H, W) and `labels` (N,), which count classes from 0, are arrays or tensors. You may instead give a
    `Dataset` of such pairs, or a `LatentStore`, as `latents`, and no `labels`. Arrays and data sets are normalised per channel.
    `validation` is a pair of held-out latents and labels; without it, a tenth of the latents is held out.

    `strategy` is the name of a strategy, or a dictionary with its `rules`. An argument that you leave out has the value in the
    package's `params.yaml`. `settings` changes other values there by dotted keys, such as `{"diffusion.objective": "flow"}`. If
    you give the parameters, seed and `LatentStore` of a run of a study, the weights are bit-identical to those of that run.

    Raises `ConfigError` for a wrong parameter and `DataError` for wrong latents or labels, before anything is trained.
    """
    given = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "device": device, "threads": threads}
    values = {f"train.{key}": value for key, value in given.items() if value is not None}
    _check_seed(seed)
    with TemporaryDirectory(prefix="dit-") as folder:
        store = write_store(latents, labels, validation, num_classes, Path(folder, "latents"))
        name, params = _parameters(model, strategy, seed, store, {**(settings or {}), **values})
        with _repeatable(params):
            return _run(name, seed, params, store, Path(folder, "run"))


def _run(name: str, seed: int, params: Params, store: LatentStore, scratch: Path) -> Run:
    device = resolve_device(params.train.device)
    network = init.apply(params.network(store.sizes), params.strategies[name], seed)
    diffusion = Diffusion(params.diffusion, device)
    dropout = params.model.label_dropout
    trainer = Trainer(network, store, diffusion, params.train, label_dropout=dropout, seed=seed, scratch=scratch)
    trainer.run(f"train {name}-{seed}")
    network.load_state_dict(trainer.averaged_weights())
    described = ModelConfig(
        model=params.model,
        diffusion=params.diffusion,
        sizes=store.sizes,
        shift=tuple(store.shift.flatten().tolist()),
        scale=tuple(store.scale.flatten().tolist()),
    )
    return Run(
        strategy=name,
        seed=seed,
        params=params,
        model=Model(network.eval(), described),
        outcome=trainer.outcome(),
        history=_history(trainer.records),
        losses=_table(trainer.records, "metrics"),
        diagnostics=_table(trainer.records, "diagnostics"),
        stability=_table(trainer.records, "stability"),
        events=_table(trainer.records, "events"),
    )


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed = {seed!r}: expected a whole number from 0")


def _parameters(
    model: str, strategy: str | Mapping[str, Any] | Strategy, seed: int, store: LatentStore, values: Mapping[str, Any]
) -> tuple[str, Params]:
    """The name of the strategy, and the parameters of a study that has only this run, on latents of the store's size."""
    defaults = config.load(config.shipped())
    name, own = _named(strategy, defaults)
    held = len(store.split("validation"))
    objective = values.get("diffusion.objective", defaults.diffusion.objective)
    if "train.validation.buckets" not in values and held < defaults.train.validation.buckets:
        raise DataError(
            f"{held} latents are held out, fewer than the {defaults.train.validation.buckets} ranges of timesteps that errors "
            "are reported for: give more latents, or validation=(latents, labels)"
        )
    fixed: dict[str, Any] = {
        "study": {"name": "one run", "baseline": name, "strategies": [name], "seeds": [seed]},
        "strategies": own,
        "model": {"name": model, "label_dropout": defaults.model.label_dropout},
        "autoencoder.latent_channels": store.latent_channels,
        "images.size": store.latent_size * defaults.autoencoder.downsample,
        "evaluate.guidance_scale": 1.0,  # `dit.train` draws no samples; `dit.sample` checks its own arguments
    }
    if objective != "eps":
        fixed["diffusion.learn_sigma"] = False
    if fitting := SCHEDULERS.get(objective):
        fixed["evaluate.scheduler"] = fitting[0]
    return name, defaults.with_values({**fixed, **values}, "dit.train")


def _named(strategy: str | Mapping[str, Any] | Strategy, defaults: Params) -> tuple[str, dict[str, Any]]:
    """The name of a strategy, and its entry for `strategies` of the parameters (empty if the parameters have it already)."""
    if isinstance(strategy, Strategy):
        return OWN, {OWN: {"rules": strategy.resolved}}
    if isinstance(strategy, Mapping):
        return OWN, {OWN: dict(strategy)}
    if strategy not in defaults.strategies:
        hint = did_you_mean(str(strategy), defaults.strategies) or f"; expected one of {', '.join(defaults.strategies)}"
        raise ConfigError(f"unknown strategy '{strategy}'{hint}")
    return strategy, {}


@contextmanager
def _repeatable(params: Params) -> Iterator[None]:
    """Set threads and determinism by the parameters, and restore them afterwards, because a notebook goes on computing."""
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    benchmark = torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    make_deterministic(params.train.threads, params.train.deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _table(records: Records, name: str) -> pd.DataFrame:
    return pd.DataFrame(getattr(records, name) or [], columns=None if getattr(records, name) else list(TABLES[name]))


def _history(records: Records) -> pd.DataFrame:
    """Validation errors by step."""
    by_weights = _table(records, "validation").pivot_table("mse", "step", "weights", aggfunc="last", dropna=False)
    named = by_weights.rename(columns={"model": "validation_mse", "ema": "ema_validation_mse"})
    return named[["validation_mse", "ema_validation_mse"]].rename_axis(columns=None).reset_index()

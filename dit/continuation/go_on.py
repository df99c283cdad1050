"""Continues a run from a kept checkpoint, one variant after the other."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit import models
from dit.continuation.request import Variant
from dit.continuation.results import Result, sentence, write, write_comparison
from dit.data.latents import LatentStore
from dit.devices import make_deterministic, name_of, resolve_device, resolve_precision
from dit.diffusion import Diffusion
from dit.distributed import Ranks, joined
from dit.errors import ConfigError
from dit.optim.carried import carried
from dit.optim.fused import unserved
from dit.optim.optimizer import check as check_optimizer
from dit.terminal import plain
from dit.training.kept import Kept, KeptRun, RunSettings, digest
from dit.training.loop import Trainer
from dit.training.records import Records

OF_BATCHES = (
    *("seed", "model.label_dropout", "train.batch_size"),
    *("diffusion.num_timesteps", "diffusion.timestep_sampling", "diffusion.logit_normal_mean", "diffusion.logit_normal_std"),
)
"""The parameters that determine the samples, noise, timesteps and dropped labels of a step."""


def go_on(kept: Kept, chosen: Sequence[Variant], steps: int, output: Path | None, latents: Path | None = None) -> list[Result]:
    """Continue `kept` for `steps` steps in each variant, one after the other, and print how each ends.

    A single variant writes the tables of its run into `output`; several variants each write into a folder inside `output`. If
    there are several processes, all except the first return an empty list. Raises `ConfigError` before the first step if a
    variant cannot run.
    """
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists: expected a folder that is not there yet, or is empty")
    store = _latents(kept.run, latents)
    weights = kept.load()["model"]
    for variant in chosen:
        _check(variant, kept.run, weights)
    results = []
    make_deterministic(chosen[0].settings.train.threads, chosen[0].settings.train.deterministic)
    with joined(resolve_device(chosen[0].settings.train.device)) as ranks:
        if ranks.is_main:
            print(f"{kept.run.settings.name} from step {kept.step:,} to {kept.step + steps:,}: {kept.path} ({kept.size})")
        for variant in chosen:
            result, records = _continued(kept, variant, store, kept.step + steps, ranks)
            gc.collect()  # a network and its optimiser refer to each other
            if ranks.is_main:
                print(f"{variant.name}: {sentence(result)}", flush=True)
                results.append(result)
                if output is not None:
                    write(output / variant.name if len(chosen) > 1 else output, kept, result, records)
                if output is not None and len(chosen) > 1:
                    write_comparison(output, results)
    return results


def _latents(run: KeptRun, directory: Path | None) -> LatentStore:
    store = LatentStore(directory or run.latents)
    if digest(store) != run.latents_digest:
        raise ConfigError(
            f"{store.store.directory} does not hold the latents that {run.settings.name} was trained on; "
            "give the folder that does: --latents FOLDER"
        )
    return store


def _check(variant: Variant, run: KeptRun, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise `ConfigError` that names the variant if it cannot run here, or its network cannot take the weights."""
    train = variant.settings.train
    try:
        device = resolve_device(train.device)
        precision = resolve_precision(train.precision, device)
        with torch.device("meta"):
            network = _network(variant.settings, run)
        _check_fit(weights, network)
        check_optimizer(train, models.roles(network))
        models.backend_for(network, train.backend, device, precision, "train", unserved=unserved(train.optimizer))
    except ConfigError as error:
        raise ConfigError(f"{variant.name}: {error}") from None


def _network(settings: RunSettings, run: KeptRun) -> nn.Module:
    learn_sigma = settings.diffusion.learn_sigma
    return models.build(settings.model.name, learn_sigma=learn_sigma, **run.sizes, **settings.model.options)


def _continued(kept: Kept, variant: Variant, store: LatentStore, until: int, ranks: Ranks) -> tuple[Result, Records]:
    """Continue one variant until step `until`, or until it diverges or a collapse ends it."""
    settings = variant.settings
    device = resolve_device(settings.train.device)
    if device.type != ranks.device.type:
        ranks = Ranks(device)
    make_deterministic(settings.train.threads, settings.train.deterministic)
    if not settings.train.deterministic:
        torch.use_deterministic_algorithms(False)  # a variant before this one may have asked for them
    unsaved = settings.train.model_copy(update={"checkpoint_every": until + 1, "keep_checkpoints": ()})
    trainer = Trainer(
        _network(settings, kept.run),
        store,
        Diffusion(settings.diffusion, ranks.device),
        unsaved,  # so that nothing is written into the folder of the checkpoint
        label_dropout=settings.model.label_dropout,
        seed=settings.seed,
        scratch=kept.path,
        ranks=ranks,
    )
    state = kept.load()
    told = _carry_over(state, variant, kept, trainer)
    if ranks.is_main:
        lines = (f"  {heading.replace('_', ' ')}: {'; '.join(what)}" for heading, what in told.items() if what)
        print("\n".join([f"{variant.name}: {plain(variant.words)}", *lines]), flush=True)
    trainer.restore(state)
    trainer.last_step = until
    trainer.go_on(variant.name)
    ended = trainer.outcome()
    spikes = (event["step"] for event in trainer.records.events if event["kind"] == "spike" and event["step"] >= kept.step)
    error = trainer.stability.errors[-1] if trainer.stability.errors else None
    result = Result(variant.name, variant.words, ended, kept.step, next(spikes, None), error, told)
    return result, trainer.records


def _check_fit(saved: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in saved]
    wrong += [f"{key} is of no use" for key in saved if key not in own]
    wrong += [
        f"{key} is {' x '.join(map(str, saved[key].shape))}, expected {' x '.join(map(str, weight.shape))}"
        for key, weight in own.items()
        if key in saved and saved[key].shape != weight.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(f"the checkpoint's weights do not fit this network: {', '.join(wrong[:3])}{more}")


def _carry_over(state: dict[str, Any], variant: Variant, kept: Kept, trainer: Trainer) -> dict[str, list[str]]:
    """Remove from `state` the optimiser state that the variant cannot use.

    Returns in words what is carried over, what is not, and what is computed differently.
    """
    taken, left = ["weights", "their average (EMA)", "what was measured so far"], []
    before, after = kept.run.settings.train.optimizer, variant.settings.train.optimizer
    weights = state["optimizer"]["weights"]
    fitting = carried(before, after, models.roles(trainer.model)) & weights.keys()
    if trainer.backend == "fused" and len(fitting) < len(weights):
        fitting = set()  # fused AdamW has one count of steps for all weights
    state["optimizer"]["weights"] = {name: weights[name] for name in weights if name in fitting}
    if fitting:
        taken.append(f"the optimiser's state of {_of(len(fitting), len(weights))} weights")
    if len(fitting) < len(weights):
        why = f"{before.name} left another kind" if before.name != after.name else "its arguments changed what it holds"
        left.append(
            f"the optimiser's state of {_of(len(weights) - len(fitting), len(weights))} weights, which starts empty: {why}"
        )
    scaled = bool(state["optimizer"]["scaler"])
    if trainer.precision == torch.float16 and not scaled:
        left.append("the factor of loss scaling, which starts anew")
    changed = [key for key in OF_BATCHES if key in variant.changes]
    if trainer.diffusion.device.type != kept.run.device:
        changed.append("the kind of device, which draws the noise,")
    if changed:
        left.append(f"batches: {' and '.join(changed)} changed, so that they are others")
    else:
        taken.append(f"batches from step {kept.step:,} on")
    return {"carried_over": taken, "not_carried_over": left, "computed_otherwise": _otherwise(kept.run, trainer)}


def _otherwise(run: KeptRun, trainer: Trainer) -> list[str]:
    """In words, what may round differently from the run, even if no parameter changed: backend, device, processes and torch."""
    here = (trainer.backend, name_of(trainer.precision), "on", trainer.diffusion.device.type)
    pairs = (
        (" ".join(here), f"{run.backend} {run.precision} on {run.device}"),
        (f"processes: {trainer.ranks.size}", str(run.processes)),
        (f"torch {torch.__version__}", run.torch),
    )
    return [f"{now}, the run {then}" for now, then in pairs if not now.endswith(then)]


def _of(some: int, every: int) -> str:
    return f"all {every}" if some == every else f"{some} of {every}"

"""A run continued from a kept checkpoint under other parameters, to find what made it collapse.

Batches are functions of seed and step, so a continuation meets the data that the run met; with nothing changed it takes the
run's own steps, bit for bit.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.box import SIMPLE
from rich.table import Table
from torch import nn

from dit import checkpoint, csvfile, models, yamlfile
from dit.data.latents import LatentStore
from dit.devices import make_deterministic, name_of, resolve_device, resolve_precision
from dit.diffusion import Diffusion
from dit.distributed import Ranks, joined
from dit.errors import ConfigError, explain
from dit.optim.carried import carried
from dit.optim.fused import unserved
from dit.optim.optimizer import check as check_optimizer
from dit.terminal import plain
from dit.training.kept import Kept, KeptRun, RunSettings, digest, kept_in
from dit.training.loop import Trainer
from dit.training.records import Outcome, Records, outcome

UNCHANGED = "unchanged"
"""The name of a continuation with the run's own parameters."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
ASSIGNMENT = re.compile(r"[,\s]+(?=[A-Za-z_][\w.]*=)")
"""What separates `key=value` from the next: a value may have commas and spaces of its own, as lists do."""

OF_BATCHES = (
    *("seed", "model.label_dropout", "train.batch_size"),
    *("diffusion.num_timesteps", "diffusion.timestep_sampling", "diffusion.logit_normal_mean", "diffusion.logit_normal_std"),
)
"""The parameters that decide which samples, noise, timesteps and dropped labels a step has."""

ABSENT = "(absent)"
"""Stands for the value of a key that an optimiser or a schedule does not have."""

FILE = "continuation.json"
COMPARISON = "comparison.csv"


@dataclass(frozen=True)
class Variant:
    """A continuation: its name, the settings it has, and by dotted key what they were and are, where that differs."""

    name: str
    settings: RunSettings
    changes: Mapping[str, tuple[Any, Any]]

    @property
    def words(self) -> str:
        """What differs, such as "train.precision: bf16 -> fp32"."""
        changes = (f"{key}: {_word(old)} -> {_word(new)}" for key, (old, new) in self.changes.items())
        return ", ".join(changes) or "the run's own parameters"


@dataclass(frozen=True)
class Result:
    """How a continuation ended: `spike` is its first one, and `error` the last training error that was read."""

    name: str
    changes: str
    outcome: Outcome
    from_step: int
    spike: int | None
    error: float | None
    carried: list[str]
    not_carried: list[str]

    @property
    def collapse(self) -> int | None:
        """The step of the collapse, if the run has not recovered from it."""
        return self.outcome.collapsed.step if self.outcome.collapsed else None


def find(target: str, scratch: Path, step: int | None) -> Kept:
    """The kept checkpoint that `target` means: its folder, a run's scratch folder, or a run's name below `scratch`.

    Raises `ConfigError`, which lists what there is, where that is none or several.
    """
    path = Path(target)
    if (path / checkpoint.FILE).is_file() and path.name.isdecimal():
        found = [Kept(path, int(path.name), KeptRun.read(path.parent / "run.json"))]
    elif path.is_dir() and (own := list(kept_in(path))):
        found = own
    else:
        found = [kept for kept in kept_below(scratch) if kept.run.settings.name == path.name]
    if not found:
        raise ConfigError(
            f"no checkpoint of '{target}' is kept in {scratch}; a run keeps those of the steps in train.keep_checkpoints, "
            "and the last good one before a collapse"
        )
    chosen = [kept for kept in found if step in (None, kept.step)]
    if len(chosen) == 1:
        return chosen[0]
    listed = "\n".join(f"  step {kept.step}: {kept.path} ({kept.size})" for kept in chosen or found)
    if chosen:
        raise ConfigError(f"several checkpoints of '{target}' are kept; give one of these paths, or --step:\n{listed}")
    raise ConfigError(f"no checkpoint of '{target}' is kept at step {step}; these are:\n{listed}")


def kept_below(scratch: Path) -> list[Kept]:
    """All checkpoints that runs have kept in their folders in `scratch`."""
    return list(kept_in(*sorted(scratch.glob("*"))))


def variants(kept: Kept, common: Sequence[str], named: Sequence[str], control: bool) -> list[Variant]:
    """The continuations that were asked for: one with the `common` changes, `key=value` each, or several with more.

    Each of `named` is `name: key=value, key=value`. Before them comes the run as it was, where a `control` is wanted. Raises
    `ConfigError` where a change is no change of the run's settings, or two have one name.
    """
    shared = dict(_assignment(change) for change in common)
    if not named:
        return [_variant("changed" if shared else UNCHANGED, kept.run.settings, shared)]
    found = [_variant(UNCHANGED, kept.run.settings, {})] if control else []
    for text in named:
        name, colon, changes = text.partition(":")
        name = name.strip()
        if not colon or not NAME.fullmatch(name):
            raise ConfigError(f"--variant '{text}': expected a name and what it changes, such as 'fp32: train.precision=fp32'")
        own = dict(_assignment(change) for change in ASSIGNMENT.split(changes.strip()) if change)
        found.append(_variant(name, kept.run.settings, {**shared, **own}))
    names = [variant.name for variant in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"two variants are called '{max(names, key=names.count)}'; give each a name of its own")
    return found


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.strip().partition("=")
    if not equals:
        raise ConfigError(f"'{text}' changes nothing; expected key=value, such as train.precision=fp32")
    return key.strip(), yamlfile.parse(value, f"the value of {key}")


def _variant(name: str, before: RunSettings, values: Mapping[str, Any]) -> Variant:
    data = before.model_dump(mode="json")
    for key, value in values.items():
        *sections, last = key.split(".")
        section: Any = data
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or key == "name":
            raise ConfigError(f"{key} is no parameter of a run; expected seed, or a key of model, diffusion or train")
        section[last] = value
    try:
        settings = RunSettings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, name, data)) from None
    old, new = (_flat(each.model_dump(mode="json")) for each in (before, settings))
    keys = [key for key in {**old, **new} if old.get(key, ABSENT) != new.get(key, ABSENT)]
    changes = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys}
    return Variant(name, settings, changes)


def _word(value: Any) -> str:
    """A value as `params.yaml` would have it, near enough to read."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _flat(section: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Every value by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
    return found


def go_on(kept: Kept, chosen: Sequence[Variant], steps: int, output: Path | None, latents: Path | None = None) -> list[Result]:
    """Continue `kept` for so many `steps` in each of the variants, one after the other, and say how each ends.

    Each writes the tables of a run into `output`, or of several each into a folder of its own. Of several processes, all but
    the first return nothing. Raises `ConfigError` before the first step where a variant cannot run.
    """
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists: expected a folder that is not there yet, or is empty")
    store = _latents(kept.run, latents)
    for variant in chosen:
        _check(variant, kept)
    results = []
    make_deterministic(chosen[0].settings.train.threads, chosen[0].settings.train.deterministic)
    with joined(resolve_device(chosen[0].settings.train.device)) as ranks:
        if ranks.is_main:
            print(f"{kept.run.settings.name} from step {kept.step:,} to {kept.step + steps:,}: {kept.path} ({kept.size})")
        for variant in chosen:
            result, records = _continued(kept, variant, store, kept.step + steps, ranks)
            gc.collect()  # a network and its optimiser hold each other
            if ranks.is_main:
                print(f"{variant.name}: {_sentence(result)}", flush=True)
                results.append(result)
                if output is not None:
                    _write(output / variant.name if len(chosen) > 1 else output, kept, result, records)
                if output is not None and len(chosen) > 1:
                    rows = [_row(result) for result in results]
                    csvfile.write(output / COMPARISON, tuple(rows[0]), rows)
    return results


def _latents(run: KeptRun, directory: Path | None) -> LatentStore:
    store = LatentStore(directory or run.latents)
    if digest(store) != run.latents_digest:
        raise ConfigError(
            f"{store.store.directory} does not hold the latents that {run.settings.name} was trained on; "
            "give the folder that does: --latents FOLDER"
        )
    return store


def _check(variant: Variant, kept: Kept) -> None:
    """Raise `ConfigError` that names the variant where it cannot run here."""
    train = variant.settings.train
    try:
        device = resolve_device(train.device)
        precision = resolve_precision(train.precision, device)
        with torch.device("meta"):
            network = _network(variant.settings, kept.run)
        check_optimizer(train, models.roles(network))
        models.backend_for(network, train.backend, device, precision, "train", unserved=unserved(train.optimizer))
    except ConfigError as error:
        raise ConfigError(f"{variant.name}: {error}") from None


def _network(settings: RunSettings, run: KeptRun) -> nn.Module:
    learn_sigma = settings.diffusion.learn_sigma
    return models.build(settings.model.name, learn_sigma=learn_sigma, **run.sizes, **settings.model.options)


def _continued(kept: Kept, variant: Variant, store: LatentStore, until: int, ranks: Ranks) -> tuple[Result, Records]:
    """Continue one variant until the step `until`, or as long as it goes."""
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
    _check_fit(state["model"], trainer.model, variant.name)
    taken, left = _carry_over(state, variant, kept, trainer)
    if ranks.is_main:
        print(f"{variant.name}: {plain(variant.words)}\n  carried over: {'; '.join(taken)}")
        if left:
            print(f"  not carried over: {'; '.join(left)}", flush=True)
    trainer.restore(state)
    trainer.last_step = until
    trainer.go_on(variant.name)
    ended = outcome(
        trainer.records,
        trainer.divergence,
        steps_done=trainer.steps_done,
        parameters=sum(weight.numel() for weight in trainer.model.parameters()),
        target_second_moment=trainer.validation.target_second_moment,
    )
    spikes = (event["step"] for event in trainer.records.events if event["kind"] == "spike" and event["step"] >= kept.step)
    error = trainer.stability.errors[-1] if trainer.stability.errors else None
    result = Result(variant.name, variant.words, ended, kept.step, next(spikes, None), error, taken, left)
    return result, trainer.records


def _check_fit(saved: Mapping[str, torch.Tensor], model: nn.Module, name: str) -> None:
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
        raise ConfigError(f"{name}: the checkpoint's weights do not fit this network: {', '.join(wrong[:3])}{more}")


def _carry_over(state: dict[str, Any], variant: Variant, kept: Kept, trainer: Trainer) -> tuple[list[str], list[str]]:
    """Leave in `state` what the variant can go on from; in words, what that is and what it is not."""
    taken, left = ["weights", "their average (EMA)", "what was measured so far"], []
    before, after = kept.run.settings.train.optimizer, variant.settings.train.optimizer
    weights = state["optimizer"]["weights"]
    fitting = carried(before, after, models.roles(trainer.model)) & weights.keys()
    if trainer.backend == "fused" and len(fitting) < len(weights):
        fitting = set()  # its steps of Adam are counted once for all weights
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
    here, there = _arithmetic(trainer), (kept.run.backend, kept.run.precision, kept.run.device)
    if here[2] != there[2]:
        changed.append("the kind of device, which draws the noise,")
    if changed:
        left.append(f"batches: {' and '.join(changed)} changed, so that they are others")
    else:
        taken.append(f"batches from step {kept.step:,} on")
    if here != there:
        left.append(f"arithmetic: {' '.join(here)}, where the run had {' '.join(there)}")
    if kept.run.processes != trainer.ranks.size:
        left.append(f"{kept.run.processes} processes, which round otherwise than {trainer.ranks.size}")
    if kept.run.torch != torch.__version__:
        left.append(f"torch {kept.run.torch}: this is {torch.__version__}")
    return taken, left


def _of(some: int, every: int) -> str:
    return f"all {every}" if some == every else f"{some} of {every}"


def _arithmetic(trainer: Trainer) -> tuple[str, str, str]:
    return trainer.backend, name_of(trainer.precision), trainer.diffusion.device.type


def _sentence(result: Result) -> str:
    """One line of outcome."""
    ended = result.outcome
    warned = f"; first spike at step {result.spike:,}" if result.spike is not None else ""
    if result.collapse is not None and result.collapse < result.from_step:
        return f"had collapsed before, at step {result.collapse:,}, and did not recover by step {ended.steps_done:,}"
    if ended.status != "finished":
        return f"{ended.sentence}{warned}"
    return f"no collapse until step {ended.steps_done:,}: {ended.sentence}{warned}"


def _row(result: Result) -> dict[str, Any]:
    ended = result.outcome
    return {
        "variant": result.name,
        "changes": result.changes,
        "status": ended.status,
        "collapse_step": result.collapse,
        "spike_step": result.spike,
        "steps_done": ended.steps_done,
        "mse": result.error,
        "ema_validation_mse": ended.final and ended.final.ema_validation_mse,
    }


def _write(directory: Path, kept: Kept, result: Result, records: Records) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    records.write(directory)
    told = {
        "run": kept.run.settings.name,
        "checkpoint": str(kept.path),
        "from_step": kept.step,
        **_row(result),
        "carried_over": result.carried,
        "not_carried_over": result.not_carried,
    }
    (directory / FILE).write_text(json.dumps(told, indent=2) + "\n")


def comparison(results: Sequence[Result]) -> Table:
    """All continuations side by side."""
    table = Table(title=f"From step {results[0].from_step:,}", title_justify="left", box=SIMPLE)
    table.add_column("variant", no_wrap=True)
    table.add_column("parameters")
    for column in ("first spike", "collapse", "last error"):
        table.add_column(column, justify="right")
    for result in results:
        ended = result.outcome
        collapse = f"{result.collapse:,}" if result.collapse is not None else ended.status if ended.diverged else "none"
        spike = "none" if result.spike is None else f"{result.spike:,}"
        error = "" if result.error is None else f"{result.error:.4f}"
        table.add_row(result.name, plain(result.changes), spike, collapse, error)
    return table


def listing(scratch: Path) -> Table:
    """All checkpoints that runs have kept."""
    table = Table(title=f"Checkpoints kept in {scratch}", title_justify="left", box=SIMPLE)
    for column in ("run", "step", "size", "folder"):
        table.add_column(column, no_wrap=column == "folder", justify="right" if column in ("step", "size") else "left")
    for kept in kept_below(scratch):
        table.add_row(plain(kept.run.settings.name), f"{kept.step:,}", kept.size, plain(str(kept.path)))
    return table

"""The stages of a study as data: `design.yaml`, from which `dvc.yaml` makes the stages, and the parameters of each stage.

DVC cannot combine the levels of factors that a user names. So the list of stages is the file `design.yaml`, written from
`params.yaml` whenever a study starts. Besides its inputs, a stage depends on one JSON file in `runs/design`, which holds its
parameters, the rules of its strategy, and a digest of its code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dit import design as designs, yamlfile
from dit.config import Params
from dit.design import Design, Run, Setting
from dit.errors import ConfigError, InputError

FILE = "design.yaml"
OUT = Path("runs/design")
ROOT = Path(__file__).parents[1]
"""The project to which this code belongs."""
CODE = "pipelines/code.yaml"
HEADER = """\
# The stages of the study, which dvc.yaml reads. Made from params.yaml by `make study`, `make plan` and stage `design`: edit
# params.yaml, not this file.
"""
ALL = "all"
"""The key of a stage that all runs of the study share."""
DISTANCES = tuple(f"evaluate.{key}" for key in ("num_samples", "kernel_subset_size", "kernel_subsets", "nearest_k", "seed"))
"""Parameters on which a distance between two sets of images depends."""
DATA = {
    "images": ("images",),
    "autoencoder": ("images", "autoencoder"),
    "latents": ("images", "autoencoder", "latents"),
    "features": ("images", "autoencoder", "features", *DISTANCES),
}
"""Stages that make data, and the parameters on which their outputs depend."""
READS = {"images": (), "autoencoder": ("images",), "latents": ("images", "autoencoder"), "features": ("images", "autoencoder")}
ANALYSED = (*DATA["latents"], "model", "diffusion", "analyse", "train.optimizer")
"""A strategy is analysed once for all settings with the same values of these; it uses the learning rate of params.yaml."""
PARAMETERS: dict[str, tuple[str, ...]] = {
    "images": ("images.size", "images.channels", "images.seed", "images.max_rejected", "images.source"),
    "autoencoder": ("autoencoder",),
    "latents": ("latents",),
    "features": ("features", *DISTANCES),
    "analyse": ("model", "diffusion", "analyse", "train.learning_rate", "train.optimizer"),
    "train": ("model", "diffusion", "train"),
    "best": ("study",),
    "evaluate": ("model", "diffusion", "evaluate", "features"),
    "compare": ("study",),
}
"""The parameters that each stage reads."""


@dataclass(frozen=True)
class Item:
    """One stage. `stage` and `key` make its name, such as train@adaln_zero-0; `inputs` are the folders it reads, by kind."""

    stage: str
    key: str
    setting: Setting
    inputs: Mapping[str, str] = field(default_factory=dict)
    out: str = ""
    strategy: str = ""
    seed: int | None = None

    @property
    def identity_file(self) -> Path:
        """The file in which stage `design` writes everything but the inputs that determines this stage."""
        return OUT / self.stage / f"{self.key}.json"


def items(params: Params) -> dict[str, dict[str, Item]]:
    """Every stage of the study except `design`: by the kind of stage, and then by its key."""
    found = designs.design(params.study)
    data = {stage: designs.distinct(found.settings(), keys) for stage, keys in DATA.items()}
    made: dict[str, dict[str, Item]] = {stage: {} for stage in PARAMETERS}
    for stage, variants in data.items():
        for name, setting in variants.items():
            inputs = {kind: _folder(kind, setting, data) for kind in READS[stage]}
            made[stage][name or ALL] = Item(stage, name or ALL, setting, inputs, _folder(stage, setting, data))
    for strategy in params.study.strategies:
        for name, setting in designs.distinct(found.settings(strategy), ANALYSED).items():
            key = "-".join(filter(None, (strategy, name)))
            inputs = {"latents": _folder("latents", setting, data)}
            made["analyse"][key] = Item("analyse", key, setting, inputs, f"runs/analyse/{key}", strategy)
    for run in found.runs:
        inputs = {"latents": _folder("latents", run.setting, data)}
        made["train"][run.name] = Item("train", run.name, run.setting, inputs, f"runs/train/{run.name}", run.strategy, run.seed)
    made["evaluate"] = _evaluations(params, found, data)
    if params.study.sample in ("best", "one"):
        made["best"][ALL] = Item("best", ALL, Setting(), {"train": "runs/train"}, "runs/best")
    if params.study.sample == "none":
        made["features"] = {}
    made["compare"][ALL] = Item("compare", ALL, Setting())
    return made


def _evaluations(params: Params, found: Design, data: Mapping[str, Mapping[str, Setting]]) -> dict[str, Item]:
    """The stages `evaluate`. A strategy's best run is known only after all runs have been trained; `runs/best` names it."""
    study = params.study
    if study.sample == "all":
        folders = {run.name: {kind: _folder(kind, run.setting, data) for kind in EVALUATED} for run in found.runs}
        return {run.name: _evaluation(params, run, folders[run.name]) for run in found.runs}
    if study.sample == "none":
        return {}
    anywhere = {kind: f"data/{kind}" for kind in EVALUATED}
    made = {}
    for strategy in study.strategies:
        for seed in sampled_seeds(params):
            key = f"{strategy}-best-{seed}"
            inputs = {"train": f"runs/best/{strategy}.json", **anywhere, **_reference(params, Setting())}
            made[key] = Item("evaluate", key, Setting(), inputs, f"runs/evaluate/{key}", strategy, seed)
    return made


EVALUATED = ("latents", "autoencoder", "features")
"""Data that stage `evaluate` reads."""


def _evaluation(params: Params, run: Run, inputs: Mapping[str, str]) -> Item:
    read = {"train": f"runs/train/{run.name}", **inputs, **_reference(params, run.setting)}
    return Item("evaluate", run.name, run.setting, read, f"runs/evaluate/{run.name}", run.strategy, run.seed)


def _reference(params: Params, setting: Setting) -> dict[str, str]:
    """The file of reference statistics as an input, if there is one: if its content changes, the evaluation runs again."""
    path = setting.levels.get("evaluate.reference", params.evaluate.reference)
    return {} if path is None else {"reference": str(path)}


def sampled_seeds(params: Params) -> list[int]:
    """The seeds that are sampled at the best settings: those that chose nothing, or only the first of them."""
    reporting = [seed for seed in params.study.seeds if seed not in params.study.choose_on]
    return reporting[:1] if params.study.sample == "one" else reporting


def _folder(kind: str, setting: Setting, data: Mapping[str, Mapping[str, Setting]]) -> str:
    """The folder with the data of `setting`: data/latents, or data/latents/size=64 if the data depend on a factor."""
    name = designs.share(setting, DATA[kind], data[kind])
    return f"data/{kind}/{name}" if name else f"data/{kind}"


def data_folder(params: Params, run: Run, kind: str) -> str:
    """The folder with the data of a run, such as `data/images`."""
    return _folder(kind, run.setting, {kind: designs.distinct(designs.design(params.study).settings(), DATA[kind])})


def analyses(params: Params, found: Design) -> dict[str, str]:
    """The folder with the analysis of each run's strategy at its setting, by the name of the run."""
    variants = {name: designs.distinct(found.settings(name), ANALYSED) for name in params.study.strategies}
    parts = {run.name: designs.share(run.setting, ANALYSED, variants[run.strategy]) for run in found.runs}
    return {run.name: "-".join(filter(None, (f"runs/analyse/{run.strategy}", parts[run.name]))) for run in found.runs}


def content(params: Params) -> str:
    """What `design.yaml` holds for `params`."""
    found = items(params)
    listed: dict[str, Any] = {
        stage: {key: _listed(item) for key, item in by_key.items()} for stage, by_key in found.items() if stage != "compare"
    }
    # A study without samples has no distances of reference images: a folder that always exists replaces their folder.
    listed["floors"] = "data/features" if found["features"] else str(OUT / "images")
    listed["evaluated"] = "runs/evaluate" if found["evaluate"] else str(OUT / "compare" / f"{ALL}.samples.json")
    listed["reconstructions"] = f"{next(iter(found['autoencoder'].values())).out}/metrics.json"
    listed["curves"] = list(dict.fromkeys(curve_name(run) for run in designs.design(params.study).runs))
    return HEADER + yamlfile.dump({"design": listed})


def curve_name(run: Run) -> str:
    """The name of the mean curve over all seeds of one strategy and setting."""
    return "-".join(filter(None, (run.strategy, run.setting.name)))


def _listed(item: Item) -> dict[str, str]:
    """The values that `dvc.yaml` reads. DVC has no optional dependencies, so an evaluation without a reference names its own
    identity file a second time in place of the reference.
    """
    own_out = {"out": item.out} if item.stage in DATA else {}
    stand_in = {"reference": item.identity_file.as_posix()} if item.stage == "evaluate" else {}
    return {**stand_in, **item.inputs, **own_out}


def write(root: Path, params: Params) -> bool:
    """Bring `design.yaml` of `root` up to date with `params`; return whether it changed."""
    path, wanted = root / FILE, content(params)
    if path.exists() and path.read_text() == wanted:
        return False
    partial = path.with_suffix(".partial")
    partial.write_text(wanted)
    partial.replace(path)
    return True


def item_named(params: Params, stage: str, key: str) -> Item:
    """The stage called `stage`@`key`. Raises `ConfigError` if the study has no such stage."""
    known = items(params)[stage]
    if key not in known:
        example = next(iter(known), None)
        expected = f"one such as {example}" if example else "none"
        raise ConfigError(f"the study has no stage '{stage}@{key}'; expected {expected}")
    return known[key]


def identity(params: Params, item: Item) -> dict[str, Any]:
    """Everything but the inputs that determines a stage: parameters, the rules of its strategy, and its code.

    `params` are the parameters at the setting of the stage.
    """
    about: dict[str, Any] = {}
    if item.stage in ("analyse", "train"):
        about = {"rules": params.strategies[item.strategy].resolved}
    elif item.stage == "compare":
        named = {name: params.strategies[name] for name in params.study.strategies}
        about = {"strategies": {name: [strategy.description, strategy.source] for name, strategy in named.items()}}
    return {"parameters": parameters(params, item.stage), **about, "code": code_digest(item.stage)}


def parameters(params: Params, stage: str) -> dict[str, Any]:
    """The parameters that `stage` reads, by dotted key of `params.yaml`."""
    return {key: _value(params, key) for key in PARAMETERS[stage]}


def _value(params: Params, key: str) -> Any:
    value: Any = params.model_dump(mode="json", include={key.partition(".")[0]})
    for name in key.split("."):
        value = value[name]
    return value


def checked_identity(params: Params, item: Item) -> dict[str, Any]:
    """The identity that stage `design` wrote for this stage. Raises `InputError` if it is missing or out of date."""
    path = item.identity_file
    if not path.is_file():
        raise InputError(path)
    written: dict[str, Any] = json.loads(path.read_text())
    now = identity(params, item)
    for key in now:
        if written.get(key) != now[key]:
            raise InputError(path, f"was written for other {key} than {item.stage}@{item.key} has now")
    return written


@cache
def code_digest(stage: str) -> str:
    """A digest of the files and folders that are the code of `stage`."""
    digest = hashlib.sha256()
    for file in sorted({file for path in code(stage) for file in code_files(ROOT / path)}):
        digest.update(f"\n{file.relative_to(ROOT).as_posix()}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def code(stage: str) -> list[str]:
    """The files and folders that are the code of a stage."""
    found: list[str] = yamlfile.read(ROOT / CODE)[stage]
    return found


def code_files(path: Path) -> list[Path]:
    """The files of code at `path`, without Python's compiled files."""
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]

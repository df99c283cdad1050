"""Made-up studies for tests of the report: this writes the files of all stages, with curves that a test chooses.

`python tests/reports.py FOLDER` writes a study of 4 strategies at 5 learning rates and 2 depths, and its report, to look at.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from networks import dit_roles
from PIL import Image

from dit import yamlfile
from dit.analysis import wakeup
from dit.config import Params, parse
from dit.data.store import StoreWriter
from dit.design import Run, design
from dit.models import build
from pipelines.design import analyses, item_named

SHIPPED = Path(__file__).parents[1] / "params.yaml"
STEPS = 400
VALIDATED = (0, 1, 2, 4, 8, 16, 32, *range(50, STEPS + 1, 50))
FINAL = {"adaln_zero": 0.115, "head_xavier": 0.1178, "adaln": 0.1149, "gates_only_zero": 0.1151, "symmetric": 0.1223}
START = {"head_xavier": 2.15}
SAMPLED = ("frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall")
REAL, RECONSTRUCTED, GREY = (
    dict(zip(SAMPLED, row, strict=True))
    for row in ((90, 0.1, 0.05, 0.8, 0.7), (110, 0.2, 0.05, 0.7, 0.6), (700, 9, 0.05, 1, 0))
)

Errors = Callable[[Run, float], float]
"""The validation error of a run at a step."""


@dataclass(frozen=True)
class Fate:
    """How a run fails: it collapses at `step`, with a spike 8 steps before, or it diverges at `step`."""

    step: int
    collapses: bool = False


def study(changes: dict[str, Any], **others: dict[str, Any]) -> Params:
    """The shipped parameters with another study, whose runs last `STEPS` steps; `others` are changes of other sections."""
    data = yamlfile.read(SHIPPED)
    data["study"] = {"name": "planted", "baseline": changes["strategies"][0], "seeds": [0, 1, 2], **changes}
    data["train"]["steps"] = STEPS
    for section, values in others.items():
        data[section] |= values
    return parse(data)


def write_study(params: Params, errors: Errors | None = None, fates: dict[str, Fate] | None = None) -> Params:
    """Write everything that the report of `params` reads into the current folder. `fates` lists the runs that fail, by name."""
    write_images(params)
    write_autoencoder()
    write_references()
    fates = fates or {}
    found = design(params.study)
    folders = analyses(params, found)
    runs = found.runs
    for folder, strategy in {folders[run.name]: run.strategy for run in runs}.items():
        write_start(params, strategy, Path(folder))
    for run in runs:
        write_run(params, run, fates.get(run.name), errors)
    return params


def planted(
    *,
    delay: dict[str, float] | None = None,
    level: dict[str, float] | None = None,
    best: dict[str, float] | None = None,
    with_level: dict[tuple[str, str, Any], float] | None = None,
    noise: float = 0.002,
) -> Errors:
    """A validation error that falls as a power of the step, with effects that a test plants.

    `delay` (in steps), `level` (a multiplier of the error) and `best` (the rate with the lowest error) are given by strategy.
    Without `best`, the rate has no effect. `with_level` multiplies the error of a strategy ("*": all) at one level of a factor.
    """

    def error(run: Run, step: float) -> float:
        late = max(step - (delay or {}).get(run.strategy, 0), 0)
        value = (1 + late / 20) ** -0.5 * (level or {}).get(run.strategy, 1)
        if best:
            centre = best.get(run.strategy, best["*"])
            value *= 0.8 * math.exp(0.05 * math.log(run.setting.levels["train.learning_rate"] / centre) ** 2)
        for (strategy, key, planted_level), factor in (with_level or {}).items():
            if strategy in ("*", run.strategy) and run.setting.levels.get(key) == planted_level:
                value *= factor
        luck = random.Random(run.seed).gauss(0, 0.02) + random.Random(run.name).gauss(0, noise)
        return value * math.exp(luck)

    return error


def write_images(params: Params, classes: int = 4) -> None:
    size, names = params.images.size, [f"class{index}" for index in range(classes)]
    item = (np.uint8, (size, size, 3))
    label = (np.int64, ())
    directory = Path("data/images")
    writer = StoreWriter(directory, train_images=item, train_labels=label, validation_images=item, validation_labels=label)
    draws = np.random.default_rng(0)
    for split, each in (("train", 8), ("validation", 4)):
        writer.append(f"{split}_images", draws.integers(0, 256, (each * classes, size, size, 3), dtype=np.uint8))
        writer.append(f"{split}_labels", np.repeat(np.arange(classes, dtype=np.int64), each))
    counts = {"train": 8 * classes, "validation": 4 * classes, "rejected": 1}
    rejected = [{"item": "class1/broken.jpg", "reason": "truncated file"}]
    writer.close(class_names=names, source="folder", size=size, counts=counts, rejected=rejected, notes=[])


def write_autoencoder() -> None:
    directory = Path("data/autoencoder")
    (directory / "model").mkdir(parents=True)
    write_json(directory / "model/config.json", {"latent_channels": 4, "block_out_channels": [32, 64, 64]})
    write_json(directory / "metrics.json", {"psnr": 27.43, "ssim": 0.901, "num_images": 512})
    Image.fromarray(np.full((64, 256, 3), 130, np.uint8)).save(directory / "reconstructions.png")


def write_references(dimension: int = 64) -> None:
    """Write floors of the sample metrics that leave room to rank strategies."""
    Path("data/features").mkdir(parents=True)
    record = {"count": 256, "dimension": dimension, "real": REAL, "reconstructions": RECONSTRUCTED, "grey": GREY}
    write_json(Path("data/features/references.json"), record)


def write_start(params: Params, strategy: str, directory: Path) -> None:
    """Write what stage `analyse` writes: the schedule that is predicted for the strategy, and a plausible signal."""
    directory.mkdir(parents=True)
    network = build("DiT-Tiny/2", latent_size=8, latent_channels=4, num_classes=4, learn_sigma=True)
    schedule = wakeup.predict(params.strategies[strategy], network, steps=5)
    sensitivity = {"timestep_sensitivity": 0.0, "label_sensitivity": 0.0}
    mse = START.get(strategy, 1.0)
    block = {"attn_contribution": 0.0, "mlp_contribution": 0.0, "stream_rms": 0.9, "gradient_rms": 1e-3}
    start = {
        "strategy": strategy,
        "run_key": hashlib.sha256(strategy.encode()).hexdigest()[:16],
        "awake_step": wakeup.awake(schedule),
        "predicted_equals_measured": True,
        "predicted": schedule,
        "not_predicted": None,
        "measured": schedule,
        "signal": {
            "output_rms": mse - 1,
            "output_variance": (mse - 1) ** 2,
            "mse": mse,
            "zero_output_mse": 1.0,
            "expected_zero_output_mse": 1.0,
            **sensitivity,
            "blocks": [{"block": index, **block} for index in range(4)],
        },
        "early": [
            {"step": step, "mse": mse, "timestep_sensitivity": step / 9, "label_sensitivity": step / 9} for step in range(5)
        ],
        "width_exponent": 0.5,
    }
    write_json(directory / "start.json", start)
    gradient = {"norm": 0.1, "stable_rank": 3.5, "numerical_rank": 32.0, "update_ratio": 0.01}
    write_csv(
        directory / "gradients.csv",
        [{"step": step, "role": role, **gradient} for step in range(5) for role in schedule if role.endswith("weight")],
    )
    write_csv(
        directory / "coordinates.csv",
        [
            {"width": width, "step": step, "activation": name, "rms": 1.0, "change_rms": 0.01 * step * width**0.5}
            for width in (384, 768, 1024)
            for step in (1, 2)
            for name in ("block[0]", "block[1]", "prediction")
        ],
    )


def write_run(params: Params, run: Run, fate: Fate | None = None, errors: Errors | None = None) -> None:
    """Write what stage `train` writes for a run, and, if the study samples all runs, what stage `evaluate` writes."""
    key = hashlib.sha256(run.name.encode()).hexdigest()[:16]
    train = Path(f"runs/train/{run.name}")
    train.mkdir(parents=True)
    curve = Curve(run, fate, errors)
    curve.write(params, train)
    own = params.with_values(run.setting.levels)
    settings = {name: getattr(own, name).model_dump(mode="json") for name in ("model", "diffusion", "train")}
    settings["rules"] = params.strategies[run.strategy].resolved
    status = "finished" if fate is None else "collapsed" if fate.collapses else "diverged"
    diverged = {"step": fate.step, "quantity": "loss", "value": "nan"} if fate and not fate.collapses else None
    record = {
        "strategy": run.strategy,
        "seed": run.seed,
        "run_key": key,
        "device": "cpu",
        "settings": settings,
        "status": status,
        "diverged": diverged,
        "collapsed": {"step": fate.step, "mse": 0.97, "limit": 0.5, "spike": curve.spike} if fate and fate.collapses else None,
        "steps_done": curve.until,
        "parameters": 1234567,
        "initial": {"validation_mse": curve(0) if curve.until else None, "target_second_moment": 0.998},
        "final": None if fate else dict.fromkeys(("mse", "validation_mse", "ema_validation_mse"), curve(STEPS)),
    }
    write_json(train / "run.json", record)
    if params.study.sample == "all":
        write_evaluation(params, run, Path(f"runs/evaluate/{run.name}"), status, curve)


def write_evaluation(params: Params, run: Run, directory: Path, status: str, curve: Curve) -> None:
    """Write what stage `evaluate` writes for a run."""
    directory.mkdir(parents=True)
    key = hashlib.sha256(run.name.encode()).hexdigest()[:16]
    names = [*SAMPLED, "validation_mse"]
    chance = [random.Random(f"{run.strategy}{run.seed}{name}").gauss(0, 0.02) for name in names]
    values = [180 * curve(STEPS) / 0.115, 0.9, 0.05, 0.6, 0.3, curve(STEPS)]
    values = [value * (1 + off) for value, off in zip(values, [*chance[:-1], 0], strict=True)]
    record = {
        "strategy": run.strategy,
        "seed": run.seed,
        "run": run.name,
        "run_key": key[::-1],
        "train_run_key": key,
        "status": status,
        "num_generated": 256,
        "num_real": 16,
        "features": {"extractor": "efficientnet_lite0", "size": 128},
        "settings": {name: getattr(params, name).model_dump(mode="json") for name in ("evaluate", "features")},
        "metrics": dict(zip(names, values, strict=True)) if status == "finished" else dict.fromkeys(names),
    }
    write_json(directory / "metrics.json", record)
    if status == "finished":
        noise = np.random.default_rng(run.seed).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(directory / "grid.png")


def write_best(params: Params, strategy: str, setting: str, seed: int) -> None:
    """Write what stage `evaluate` writes for a strategy at its best setting."""
    run = design(params.study).named(f"{strategy}-{setting}-{seed}")
    write_evaluation(params, run, Path(f"runs/evaluate/{strategy}-best-{seed}"), "finished", Curve(run, None, None))


class Curve:
    """A plausible error by step, between the strategy's first and last errors. All strategies share a part of a seed's luck.

    If a test plants `errors`, the curve follows them instead.
    """

    def __init__(self, run: Run, fate: Fate | None, errors: Errors | None) -> None:
        self.run, self.fate, self.errors = run, fate, errors
        self.until = fate.step if fate and not fate.collapses else STEPS
        draws = random.Random(f"{run.strategy}{run.seed}")
        luck = random.Random(run.seed).gauss(0, 1)
        self.final = FINAL[run.strategy] * (1 + 0.004 * luck + 0.001 * draws.gauss(0, 1))
        self.start = START.get(run.strategy, 1.0) * (1 + 0.01 * draws.gauss(0, 1))

    def __call__(self, step: float) -> float:
        if self.fate and self.fate.collapses and step >= self.fate.step:
            return 0.97
        if self.errors:
            return self.errors(self.run, step)
        return self.final * ((STEPS + 40) / (step + 40)) ** 0.25 + (self.start - self.final * 1.82) * math.exp(-step / 12)

    @property
    def spike(self) -> dict[str, Any] | None:
        """The spike before a collapse, as a row of events.csv."""
        if not self.fate or not self.fate.collapses:
            return None
        return {"event": 0, "step": self.fate.step - 8, "kind": "spike", "quantity": "loss", "value": 1.0, "reference": 0.5}

    def write(self, params: Params, directory: Path) -> None:
        steps = [step for step in VALIDATED if step <= self.until]
        validation = [
            {"step": step, "weights": weights, "mse": self(lag * step) if self.until else math.nan}
            | {f"mse_t{bucket}": self(lag * step) * 2.5 / (1 + bucket) for bucket in range(params.train.validation.buckets)}
            for step in steps
            for weights, lag in (("model", 1.0), ("ema", 0.9))
        ]
        noise = random.Random(7)
        rest = {"gradient_norm": 1.0, "learning_rate": 1e-3}
        metrics = [
            {"step": step, "loss": self(step), "mse": self(step) * (1 + 0.1 * noise.gauss(0, 1)), **rest}
            for step in range(0, self.until, 10)
        ]
        write_csv(directory / "validation.csv", validation)
        write_csv(directory / "metrics.csv", metrics)
        (directory / "diagnostics.csv").write_text(diagnostics(self.run.strategy, self.until))
        estimates = {"squared_norm": 0.5, "covariance_trace": 40.0, "batch_norm": 1.0, "part_norm": 1.5}
        write_csv(directory / "gradient_noise.csv", [{"step": step, **estimates} for step in range(0, self.until, 50)])
        self._write_stability(directory)

    def _write_stability(self, directory: Path) -> None:
        """The gradient norm rises 20 steps before a spike, the loss 4 steps before it, and a logit in the row before it."""
        events, spikes = [], []
        columns = ("max_attention_logit", "attention_entropy", "residual_rms", "second_moment_ratio", "clipped_share")
        stability = [
            {"step": step, "block": block, **dict.fromkeys(columns, 1.0)}
            for step in range(0, self.until, 25)
            for block in (0, 1, "")
        ]
        if self.spike and self.fate:
            at = self.spike["step"]
            collapse = {
                "event": 1,
                "step": self.fate.step,
                "kind": "collapse",
                "quantity": "mse",
                "value": 0.97,
                "reference": 0.5,
            }
            events = [self.spike, collapse]
            for step in range(max(0, at - 64), at + 1):
                norm, loss = 3.0 if step >= at - 20 else 1.0, 0.4 if step >= at - 4 else 0.2
                spikes.append(
                    {"event": 0, "step": step, "loss": loss, "mse": loss, "gradient_norm": norm, "learning_rate": 1e-3}
                )
            for row in stability:
                if at - 25 < int(row["step"]) <= at and row["block"] == 1:
                    row["max_attention_logit"] = 6.0
        write_csv(directory / "events.csv", events, ("event", "step", "kind", "quantity", "value", "reference"))
        write_csv(directory / "spikes.csv", spikes, ("event", "step", "loss", "mse", "gradient_norm", "learning_rate"))
        write_csv(directory / "stability.csv", stability, ("step", "block", *columns))


@cache
def diagnostics(strategy: str, until: int) -> str:
    """The text of diagnostics.csv."""
    file = io.StringIO()
    rows = list(_diagnosed(strategy, until))
    writer = csv.DictWriter(file, rows[0] if rows else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _diagnosed(strategy: str, until: int) -> Iterator[dict[str, Any]]:
    for step in [0, 1, 2, 3, 4, *range(50, until, 50)] if until else []:
        for role in dit_roles(4):
            delay = 0 if "final.projection" in role.path else 1 if "gate" in role.path or "final" in role.path else 2
            asleep = step < max(0, delay - (strategy == "head_xavier"))
            hidden = 1 if strategy == "symmetric" else 512
            units = {"mlp_in.weight": hidden, "attn_out.weight": 4, "final.projection.weight": 32}
            yield {
                "step": step,
                "role": role.path,
                "gradient_rms": 0.0 if asleep else 1e-3 / (1 + step) * (1 + delay),
                "weight_rms": 0.02,
                "update_ratio": 0.01 if step else None,
                "zero_gradient_fraction": 1.0 if asleep else 0.0,
                "distinct_units": next((count for name, count in units.items() if role.path.endswith(name)), None),
                "effective_rank": 3.0 if role.path.endswith(("gate.weight", "final.projection.weight")) else None,
                "gate_rms": 0.01 * step if role.path.endswith("gate.weight") else None,
            }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def write_csv(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = ()) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or (rows[0] if rows else ()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def example(folder: Path) -> None:
    """Write a study with a delay, a best rate that moves, runs that collapse, and a factor that changes what a start does."""
    from pipelines.stages.compare import compare

    folder.mkdir(parents=True)
    os.chdir(folder)
    factors = {"train.learning_rate": [5.0e-4, 1.0e-3, 2.0e-3, 4.0e-3, 8.0e-3], "model.depth": [4, 8]}
    strategies = ["adaln_zero", "head_xavier", "gates_only_zero", "symmetric"]
    asked = {"choose_on": [0, 1], "declared": ["head_xavier", "symmetric"]}
    params = study({"strategies": strategies, "seeds": [0, 1, 2, 3, 4], "factors": factors, **asked})
    errors = planted(
        delay={"head_xavier": 18},
        level={"symmetric": 1.06},
        best={"*": 3e-3, "gates_only_zero": 1.5e-3},
        with_level={("*", "model.depth", 8): 0.95, ("symmetric", "model.depth", 8): 1.03},
    )
    fates = {f"adaln_zero-learning_rate=0.008,depth=8-{seed}": Fate(150 + 30 * seed, collapses=True) for seed in (1, 3, 4)}
    write_study(params, errors, fates)
    compare(params, item_named(params, "compare", "all"))


if __name__ == "__main__":
    example(Path(sys.argv[1]))

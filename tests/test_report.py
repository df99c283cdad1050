"""The report: what it reads, what it says, and that a browser shows it, on run directories as the stages write them."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import math
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import dit_roles
from PIL import Image

from dit import yamlfile
from dit.analysis import wakeup
from dit.analysis.series import diagnosed
from dit.config import Params, parse
from dit.data.store import StoreWriter
from dit.errors import DataError
from dit.models import build
from pipelines.report.runs import read_run, read_study
from pipelines.stages.compare import compare

SHIPPED = Path(__file__).parents[1] / "params.yaml"
STEPS = 400
FINAL = {"adaln_zero": 0.115, "head_xavier": 0.1178, "adaln": 0.1149, "gates_only_zero": 0.1151, "symmetric": 0.1223}
START = {"head_xavier": 2.15}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)

Workspace = Callable[..., Params]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Write a study of given strategies and seeds into an empty folder, which becomes the current one."""
    monkeypatch.chdir(tmp_path)

    def write(strategies: list[str], seeds: list[int], diverged: tuple[str, ...] = (), at: int = 120) -> Params:
        data = yamlfile.read(SHIPPED)
        data["study"] |= {"strategies": strategies, "seeds": seeds, "baseline": strategies[0]}
        data["train"]["steps"] = STEPS
        params = parse(data)
        write_images(params)
        write_autoencoder()
        for strategy in strategies:
            write_start(params, strategy)
            for seed in seeds:
                write_run(params, strategy, seed, until=at if f"{strategy}-{seed}" in diverged else STEPS)
        return params

    return write


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


def write_start(params: Params, strategy: str) -> None:
    """What stage `analyse` writes: the schedule that the architecture predicts, and a plausible signal."""
    directory = Path(f"runs/analyse/{strategy}")
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


def write_run(params: Params, strategy: str, seed: int, *, until: int) -> None:
    diverged = until < STEPS
    key = hashlib.sha256(f"{strategy}-{seed}".encode()).hexdigest()[:16]
    train, evaluate = Path(f"runs/train/{strategy}-{seed}"), Path(f"runs/evaluate/{strategy}-{seed}")
    train.mkdir(parents=True)
    evaluate.mkdir(parents=True)
    curve = Curve(strategy, seed, until)
    curve.write(params, train)
    settings = {name: getattr(params, name).model_dump(mode="json") for name in ("model", "diffusion", "train")}
    settings["rules"] = params.strategies[strategy].resolved
    run = {
        "strategy": strategy,
        "seed": seed,
        "run_key": key,
        "device": "cpu",
        "settings": settings,
        "status": "diverged" if diverged else "finished",
        "diverged": {"step": until, "quantity": "loss", "value": "nan"} if diverged else None,
        "steps_done": until,
        "parameters": 1234567,
        "initial": {"validation_mse": curve(0) if until else None, "target_second_moment": 0.998},
        "final": None if diverged else dict.fromkeys(("mse", "validation_mse", "ema_validation_mse"), curve(STEPS)),
    }
    write_json(train / "run.json", run)
    names = ["frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall", "validation_mse"]
    chance = [random.Random(f"{strategy}{seed}{name}").gauss(0, 0.02) for name in names]
    levels = [180 * curve.final / 0.115, 0.9, 0.05, 0.6, 0.3, curve(STEPS)]
    values = [level * (1 + off) for level, off in zip(levels, [*chance[:-1], 0], strict=True)]
    record = {
        "strategy": strategy,
        "seed": seed,
        "run_key": key[::-1],
        "train_run_key": key,
        "status": run["status"],
        "num_generated": 256,
        "num_real": 16,
        "features": {"extractor": "efficientnet_lite0", "size": 128},
        "settings": {name: getattr(params, name).model_dump(mode="json") for name in ("evaluate", "features")},
        "metrics": dict.fromkeys(names) if diverged else dict(zip(names, values, strict=True)),
    }
    write_json(evaluate / "metrics.json", record)
    if not diverged:
        noise = np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(evaluate / "grid.png")


class Curve:
    """A plausible error by step: a power law from the strategy's start to its end, with a seed's luck that strategies share."""

    def __init__(self, strategy: str, seed: int, until: int) -> None:
        self.strategy, self.until = strategy, until
        draws = random.Random(f"{strategy}{seed}")
        self.luck = random.Random(seed).gauss(0, 1)
        self.final = FINAL[strategy] * (1 + 0.004 * self.luck + 0.001 * draws.gauss(0, 1))
        self.start = START.get(strategy, 1.0) * (1 + 0.01 * draws.gauss(0, 1))

    def __call__(self, step: float) -> float:
        return self.final * ((STEPS + 40) / (step + 40)) ** 0.25 + (self.start - self.final * 1.82) * math.exp(-step / 12)

    def write(self, params: Params, directory: Path) -> None:
        steps = [step for step in (0, 1, 2, 4, 8, 16, 32, *range(50, STEPS + 1, 50)) if step <= self.until]
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
        write_csv(directory / "diagnostics.csv", list(self._diagnostics()))
        estimates = {"squared_norm": 0.5, "covariance_trace": 40.0, "batch_norm": 1.0, "part_norm": 1.5}
        write_csv(directory / "gradient_noise.csv", [{"step": step, **estimates} for step in range(0, self.until, 50)])

    def _diagnostics(self) -> Iterator[dict[str, Any]]:
        for step in [0, 1, 2, 3, 4, *range(50, self.until, 50)] if self.until else []:
            for role in dit_roles(4):
                delay = 0 if "final.projection" in role.path else 1 if "gate" in role.path or "final" in role.path else 2
                asleep = step < max(0, delay - (self.strategy == "head_xavier"))
                hidden = 1 if self.strategy == "symmetric" else 512
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


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else (), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summary() -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"summary.json holds {constant}")

    return json.loads(Path("reports/summary.json").read_text(), parse_constant=refuse)


def change(path: str, edit: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(Path(path).read_text())
    edit(record)
    write_json(Path(path), record)


ALL = list(FINAL)


def test_the_answer_is_read_off_the_numbers(workspace: Workspace) -> None:
    compare(workspace(ALL, [0, 1, 2]))
    found = summary()
    answer, *others = found["headline"]
    assert answer.startswith("Yes. The zero head ends training with a lower validation error")
    assert any("The control is caught: symmetric is worse" in text for text in others)
    assert any("adaln is not distinguishable" in text for text in others)
    assert any("head_xavier starts at 2.1" in text and "start at the error of a zero output (1.00" in text for text in others)
    assert any("from step 1 on in head_xavier and adaln and from step 2 on in adaln_zero" in text for text in others)
    difference = found["strategies"]["symmetric"]["difference"]["validation_mse"]
    assert 0 < difference["low"] < difference["mean"] < difference["high"]
    assert found["comparisons"] == 4 * (5 + len(found["compared_steps"]))


def test_the_opposite_numbers_give_the_opposite_answer(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FINAL, "adaln_zero", 0.125)
    compare(workspace(["head_xavier", "adaln_zero"], [0, 1, 2]))
    assert summary()["headline"][0].startswith("No. The zero head ends training with a higher validation error")


def test_equal_ends_are_called_not_distinguishable_and_the_control_not_caught(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for strategy in ("head_xavier", "symmetric"):
        monkeypatch.setitem(FINAL, strategy, FINAL["adaln_zero"])
    compare(workspace(["adaln_zero", "head_xavier", "symmetric"], [0, 1, 2]))
    answer, _, *others = summary()["headline"]
    assert answer.startswith("Not distinguishable.")
    assert any(text.startswith("The control is not caught") and "null result" in text for text in others)


@dataclass(frozen=True)
class Case:
    strategies: list[str]
    seeds: list[int]
    answer: str
    warning: str = ""
    diverged: tuple[str, ...] = ()
    at: int = 120


HEADS = ["adaln_zero", "head_xavier"]
CASES = [
    Case(HEADS, [3], "Undecided. One seed", "One seed: differences"),
    Case(HEADS, [0, 1], "Yes. The zero head", "12.7 standard errors"),
    Case(HEADS, [0, 1], "Yes. With the random head every", "2 runs diverged", diverged=("head_xavier-0", "head_xavier-1")),
    Case(HEADS, [0, 1], "No. With the zero head", "at step 0 (loss nan)", diverged=("adaln_zero-0", "adaln_zero-1"), at=0),
    Case(HEADS, [0, 1], "Undecided. There is no seed", "2 runs diverged", diverged=("adaln_zero-0", "head_xavier-1")),
    Case(["adaln_zero", "symmetric"], [0, 1, 2], "In final validation error, symmetric is worse", diverged=("symmetric-2",)),
    Case(["adaln", "gates_only_zero"], [0, 1, 2], "Not distinguishable. No strategy's"),
    Case(["adaln"], [0, 1], "The study holds one strategy"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{'+'.join(case.strategies)}, {len(case.seeds)} seeds, {case.answer}")
def test_any_study_gets_a_report_that_says_what_it_cannot_say(workspace: Workspace, case: Case) -> None:
    compare(workspace(case.strategies, case.seeds, case.diverged, case.at))
    words = summary()["headline"]
    assert words[0].startswith(case.answer)
    assert any(case.warning in text for text in words)
    titles = re.findall("<title>(.*)</title>", Path("reports/index.html").read_text())
    assert html.unescape(titles[0]).endswith(words[0])


def test_a_collapsed_run_is_named_and_belongs_to_no_mean(workspace: Workspace) -> None:
    params = workspace(HEADS, [0, 1], diverged=("head_xavier-0", "head_xavier-1"))
    compare(params)
    before = summary()["strategies"]["head_xavier"]["mean"]
    spike = {"event": 0, "step": 70, "kind": "spike", "quantity": "loss", "value": 1.0, "reference": 0.5}
    collapsed = {"step": 77, "mse": 0.97, "limit": 0.5, "spike": spike}
    change(
        "runs/train/head_xavier-1/run.json",
        lambda record: record.update(status="collapsed", diverged=None, collapsed=collapsed),
    )
    change("runs/evaluate/head_xavier-1/metrics.json", lambda record: record.update(status="collapsed"))
    compare(params)
    page, found = html.unescape(Path("reports/index.html").read_text()), summary()
    assert "<td>collapsed at step 77</td>" in page
    assert any("1 run collapsed: head_xavier-1 at step 77 (error 0.97)." in text for text in found["headline"])
    assert "every run diverged or collapsed" in found["headline"][0]
    assert found["strategies"]["head_xavier"]["mean"] == before
    assert found["strategies"]["head_xavier"]["runs"]["1"]["collapsed"] == collapsed


def test_a_run_whose_samples_are_not_finite_keeps_its_validation_error(workspace: Workspace) -> None:
    params = workspace(HEADS, [0, 1])
    lost = {"frechet_distance": None, "kernel_distance": None, "kernel_distance_std": None, "precision": None, "recall": None}
    change(
        "runs/evaluate/head_xavier-1/metrics.json",
        lambda record: record.update(status="diverged", metrics=record["metrics"] | lost),
    )
    Path("runs/evaluate/head_xavier-1/grid.png").unlink()
    compare(params)
    found = summary()
    assert any("Sampling met values that are not finite in head_xavier-1" in text for text in found["headline"])
    difference = found["strategies"]["head_xavier"]["difference"]
    assert (difference["validation_mse"]["n"], difference["frechet_distance"]["n"]) == (2, 1)


def test_a_verdict_that_rests_on_the_averaging_alone_is_pointed_out(workspace: Workspace) -> None:
    params = workspace(["adaln_zero", "head_xavier", "adaln"], [0, 1, 2])
    for seed in params.study.seeds:
        change(f"runs/evaluate/adaln-{seed}/metrics.json", lambda record: record["metrics"].update(validation_mse=0.125))
        change(f"runs/evaluate/head_xavier-{seed}/metrics.json", lambda record: record["metrics"].update(validation_mse=0.1))
    compare(params)
    found = summary()
    assert found["headline"][0].startswith(
        "It depends on the averaging. The EMA weights show a lower validation error with the random"
    )
    assert found["strategies"]["adaln"]["difference"][f"validation_mse_step_{STEPS}"]["verdict"] == "not distinguishable"
    (warning,) = [text for text in found["headline"] if text.startswith("The EMA lags")]
    assert "adaln is worse by the averaged weights, not distinguishable by the trained ones" in warning


def test_the_figure_of_hidden_units_leaves_attention_heads_and_rows_of_the_head_out(workspace: Workspace) -> None:
    study = read_study(workspace(["adaln_zero", "symmetric"], [0]))
    hidden = {name: set(diagnosed(runs[0].diagnostics, "distinct_units/mlp")) for name, runs in study.runs.items()}
    assert hidden == {"adaln_zero": {512}, "symmetric": {1}}


def test_the_same_runs_give_the_same_bytes(workspace: Workspace) -> None:
    params = workspace(ALL, [0, 1])
    digests = []
    for _ in range(2):
        compare(params)
        files = sorted(path for path in Path("reports").rglob("*") if path.is_file())
        digests.append({str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    names = ["index.html", "metrics.json", "plots/training_mse.csv", "plots/validation_mse.csv", "summary.json"]
    assert list(digests[0]) == [f"reports/{name}" for name in names]


def test_dvc_reads_one_column_for_each_strategy(workspace: Workspace) -> None:
    compare(workspace(["adaln_zero", "symmetric"], [0, 1], diverged=("symmetric-1",)))
    for name in ("validation_mse", "training_mse"):
        header, first, *_ = Path(f"reports/plots/{name}.csv").read_text().splitlines()
        assert header == "step,adaln_zero,symmetric"
        assert first.startswith("0,")
    means = json.loads(Path("reports/metrics.json").read_text())
    assert means["symmetric"]["validation_mse"] == summary()["strategies"]["symmetric"]["mean"]["validation_mse"]


def test_runs_that_left_the_study_leave_the_workspace_too(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    params = workspace(["adaln_zero", "adaln"], [0, 1])
    write_run(params, "symmetric", 0, until=STEPS)
    write_run(params, "adaln", 7, until=STEPS)
    Path("runs/train/notes").mkdir()
    compare(params)
    kept = {"adaln_zero-0", "adaln_zero-1", "adaln-0", "adaln-1"}
    assert {path.name for path in Path("runs/evaluate").iterdir()} == kept
    assert {path.name for path in Path("runs/train").iterdir()} == kept | {"notes"}
    assert "removed runs/train/symmetric-0" in capsys.readouterr().out


def test_a_network_without_a_prediction_is_measured_all_the_same(workspace: Workspace) -> None:
    params = workspace(["adaln_zero", "adaln"], [0])
    for strategy in params.study.strategies:
        unpredicted = {"predicted": None, "predicted_equals_measured": None, "not_predicted": "No prediction for Adafactor."}
        change(f"runs/analyse/{strategy}/start.json", lambda record, new=unpredicted: record.update(new))
    compare(params)
    assert any("This is measured, not predicted" in text for text in summary()["headline"])
    assert "measured, not predicted</small>" in Path("reports/index.html").read_text()


def test_a_missing_run_is_named(workspace: Workspace) -> None:
    params = workspace(["adaln_zero", "adaln"], [0, 1])
    shutil.rmtree("runs/evaluate/adaln-1")
    with pytest.raises(DataError, match=r"runs/evaluate/adaln-1/metrics\.json not found"):
        compare(params)


def test_an_evaluation_of_another_training_is_refused(workspace: Workspace) -> None:
    workspace(["adaln_zero"], [0])
    change("runs/train/adaln_zero-0/run.json", lambda record: record.update(run_key="feedfacefeedface"))
    with pytest.raises(DataError, match=r"evaluates training run '\w+', but .* holds run 'feedfacefeedface'"):
        read_run("adaln_zero", 0)


def test_runs_made_with_different_parameters_are_not_compared(workspace: Workspace) -> None:
    params = workspace(["adaln_zero", "adaln"], [0])
    change("runs/train/adaln-0/run.json", lambda record: record["settings"]["train"].update(learning_rate=5e-4))
    with pytest.raises(DataError, match="adaln_zero-0 and adaln-0 were made with different train"):
        read_study(params)


class Page(HTMLParser):
    """What a browser drew: for each figure its marks and its lines at zero, and every address that any element refers to."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.figure: str | None = None
        self.marks: dict[str, int] = {}
        self.zero_lines: dict[str, int] = {}
        self.addresses: list[str] = []
        self.drawn: str | None = None
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.addresses += [found[name] for name in ("src", "href", "xlink:href") if name in found]
        if tag == "html":
            self.drawn = found.get("data-figures")
        elif tag == "figure":
            self.figure = found.get("id")
            if self.figure:
                self.marks[self.figure] = self.zero_lines[self.figure] = 0
        elif self.figure and re.match(r"[xy]\d*zl\b", found.get("class", "")):
            self.zero_lines[self.figure] += 1
        elif self.figure and (self._is_curve(tag, found) or self._is_heat_map(tag, found)):
            self.marks[self.figure] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self.figure = None

    def _is_curve(self, tag: str, attributes: dict[str, str]) -> bool:
        classes = attributes.get("class", "").split()
        return (
            tag == "path"
            and bool({"js-line", "point"} & set(classes))
            and bool(re.match(r"M-?[\d.]+", attributes.get("d", "")))
        )

    def _is_heat_map(self, tag: str, attributes: dict[str, str]) -> bool:
        return tag == "image" and attributes.get("xlink:href", attributes.get("href", "")).startswith("data:image/png")


def test_a_browser_opens_the_report_from_disk_and_shows_every_figure(workspace: Workspace, tmp_path: Path) -> None:
    assert CHROMIUM, "no browser found: `make test` installs one where it can; CHROMIUM=/path/to/chrome names another"
    compare(workspace(ALL, [0, 1, 2], diverged=("adaln-2",)))
    page = Page(dumped(Path("reports/index.html"), tmp_path / "profile"))
    names = ("differences", "validation", "early", "relative", "training", "buckets", "wake-up", "gradients")
    names += ("gradient-ranks", "depth", "conditioning", "widths", "units", "gates", "ranks", "updates")
    assert page.drawn == str(len(names))
    assert {name for name, marks in page.marks.items() if marks} == {f"figure-{name}" for name in names}
    assert [page.zero_lines[f"figure-{name}"] for name in ("differences", "relative", "buckets")] == [5, 1, 1]
    assert all(address.startswith(("data:", "#")) for address in page.addresses)


def dumped(page: Path, profile: Path) -> str:
    """The document after a headless browser opened `page` from disk and its scripts ran."""
    quiet = [
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={profile}",
        "--virtual-time-budget=20000",
    ]
    command = [str(CHROMIUM), *options, "--dump-dom", page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

"""The page: one HTML file with its style, script, pictures and Plotly, which opens from disk without a network."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from dit.analysis.comparison import INITIAL, METRICS, error_at
from dit.data.images import ImageStore
from pipelines.report.figures import Figure, looks
from pipelines.report.glossary import GLOSSARY
from pipelines.report.headline import Headline
from pipelines.report.listings import listings
from pipelines.report.pictures import data_uri, real_grid
from pipelines.report.runs import Study
from pipelines.report.words import counted, decimals_for, fixed, listed, percent

HERE = Path(__file__).parent

FIRST_FINDINGS = 7
"""How many findings are shown below the answer; the others are folded."""

EXTRACTORS = {
    "efficientnet_lite0": "EfficientNet-Lite0, trained on ImageNet",
    "inception": "Inception v3, trained on ImageNet (as in published FID)",
}


@dataclass(frozen=True)
class Autoencoder:
    """Metrics and configuration of the autoencoder, and the picture of images beside their reconstructions."""

    metrics: dict[str, float]
    config: dict[str, Any]
    reconstructions: bytes


@dataclass(frozen=True)
class Column:
    """One column of a table: a metric, its decimals, and whether strategies are compared by it."""

    metric: str
    title: str
    decimals: int
    direction: str
    compared: bool


def render(
    study: Study,
    summary: dict[str, Any],
    *,
    headline: Headline,
    figures: dict[str, Figure],
    images: ImageStore,
    autoencoder: Autoencoder,
    partial: str = "",
) -> str:
    """The report as HTML; `partial` says which runs it contains, if these are not all runs yet."""
    template = _environment(study).get_template("template.html")
    evaluation = study.evaluation
    real = real_grid(images, evaluation.num_generated, evaluation.settings["evaluate"]["grid_rows"]) if evaluation else None
    return template.render(
        study=study,
        summary=summary,
        headline=headline,
        partial=partial,
        figures=figures,
        images=images,
        autoencoder=autoencoder,
        results=_results(summary),
        going=_going(summary),
        first_findings=FIRST_FINDINGS,
        tables=listings(study, summary),
        glossary=GLOSSARY,
        factorial=len(study.everything) > len(study.all_runs),
        extractor=EXTRACTORS[summary["features"]["extractor"]] if evaluation else None,
        settings=_settings(study),
        rules={name: _rules(study, name) for name in study.runs},
        grids=_grids(study),
        real=data_uri(real) if real else None,
        plotly=Markup(_packed_plotly()),
        style=Markup((HERE / "style.css").read_text()),
        script=Markup((HERE / "script.js").read_text()),
    )


def _environment(study: Study) -> Environment:
    loader = FileSystemLoader(HERE)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "fixed": fixed,
        "percent": percent,
        "decimals": decimals_for,
        "listed": listed,
        "counted": counted,
        "data_uri": data_uri,
        "safe_json": Markup,
        "chips": lambda text: _chips(study, text),
    }
    return environment


@cache
def _packed_plotly() -> str:
    """Plotly's script, compressed from 4.6 MB to 1.9 MB of text; always the same bytes, because no time is written."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _chips(study: Study, text: str) -> Markup:
    """Text in which every strategy's name carries its colour."""
    styles = looks(study)
    names = "|".join(re.escape(name) for name in sorted(styles, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w.])({names})(?![\w]|\.\w)")
    chip = Markup('<b class="strategy" style="--colour: {}">{}</b>')
    pieces = enumerate(pattern.split(text))
    return Markup("").join(chip.format(styles[piece].colour, piece) if index % 2 else escape(piece) for index, piece in pieces)


def _results(summary: dict[str, Any]) -> list[Column]:
    """The columns of the table of results: metrics for which any run has a value."""
    columns = [INITIAL, *METRICS]
    has = [any(entry["mean"][metric.name] is not None for entry in summary["strategies"].values()) for metric in columns]
    return [_column(summary, metric.name, metric.label) for metric, some in zip(columns, has, strict=True) if some]


def _going(summary: dict[str, Any]) -> list[Column]:
    """The columns of the table of errors during training."""
    return [_column(summary, error_at(step).name, f"error at step {step}") for step in summary["compared_steps"]]


def _column(summary: dict[str, Any], metric: str, title: str) -> Column:
    means = [entry["mean"][metric] for entry in summary["strategies"].values()]
    compared = any(metric in entry.get("difference", {}) for entry in summary["strategies"].values())
    lower = summary["metrics"][metric]["lower_is_better"]
    direction = ("lower is better" if lower else "higher is better") if compared else ""
    return Column(metric, title[:1].upper() + title[1:], min(6, decimals_for(means)), direction, compared)


def _settings(study: Study) -> dict[str, dict[str, str]]:
    """Every parameter that runs share, by section, nested keys written with dots."""
    settings = study.first.train.settings
    sections = {"model": settings.model, "diffusion": settings.diffusion, "train": settings.train}
    sections |= study.evaluation.settings if study.evaluation else {}
    return {name: {key: _shown(value) for key, value in _flat(section)} for name, section in sections.items()}


def _flat(section: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in section.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _rules(study: Study, name: str) -> list[tuple[str, bool]]:
    """The rules of a strategy as in `params.yaml`, and whether each is its own, not the baseline's."""
    base, rules = (next(iter(study.runs[side].values())).train.settings.rules for side in (study.baseline, name))
    return [(_rule(rule), rule not in base) for rule in rules]


def _rule(rule: dict[str, Any]) -> str:
    ordered = {"role": rule["role"], "init": rule["init"], **rule}
    return ", ".join(f"{key}: {_shown(value)}" for key, value in ordered.items())


def _grids(study: Study) -> dict[int, dict[str, str | None]]:
    """The sample grids by seed and strategy; None for a run without a grid. Empty if no run was sampled."""
    seeds = sorted({seed for by_seed in study.sampled.values() for seed in by_seed})
    found = {
        seed: {name: study.sampled[name][seed].grid for name in study.runs if seed in study.sampled[name]} for seed in seeds
    }
    return {
        seed: {name: data_uri(picture) if picture else None for name, picture in by_name.items()}
        for seed, by_name in found.items()
    }

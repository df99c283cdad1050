"""Shared parts of figures: the look of each strategy, curves with their spread, and the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipelines.report.colours import colours
from pipelines.report.runs import Run, Study
from pipelines.report.words import counted

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
TICKS = [mantissa * 10.0**power for power in range(-5, 5) for mantissa in (1, 1.5, 2, 3, 5, 7)]
LOG_AXIS = {"type": "log", "tickvals": TICKS, "ticktext": [f"{tick:g}" for tick in TICKS]}
TITLED = 34
"""The margin above panels that have titles, in pixels."""

ERROR_AXIS = {**LOG_AXIS, "title": "mean squared error"}


DASH_ARRAYS = {"dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "11 4", "longdashdot": "11 3 2 3"}
"""SVG dash patterns with which the legend draws Plotly's kinds of dashes."""


@dataclass(frozen=True)
class Key:
    """One entry of a legend: the group of traces that it shows and hides, its label, and its line."""

    group: str
    label: str
    colour: str
    dash: str | None

    @property
    def dashes(self) -> str:
        """The dashes of the line in SVG's notation."""
        return DASH_ARRAYS.get(self.dash or "solid", "none")


@dataclass(frozen=True)
class Figure:
    """One figure: its name in the page, what it shows, how to read it, and its Plotly description."""

    name: str
    title: str
    caption: str
    plot: go.Figure

    @property
    def json(self) -> str:
        """The description as JSON, the same for the same numbers, and safe inside a script element."""
        return self.plot.to_json(engine="json").replace("</", "<\\/")

    @property
    def keys(self) -> list[Key]:
        """The entries of its legend, in the order of the lines; none if the figure needs no legend."""
        if self.plot.layout.showlegend is False:
            return []
        named = [one for one in self.plot.data if one.type == "scatter" and one.name and one.showlegend is not False]
        return [Key(one.legendgroup or one.name, one.name, one.line.color or one.marker.color, one.line.dash) for one in named]

    @property
    def scrolls(self) -> bool:
        """Whether the figure scrolls sideways on a narrow screen, because its cells would be too small."""
        return any(one.type == "heatmap" for one in self.plot.data)


@dataclass(frozen=True)
class Look:
    """How one strategy is drawn in all figures."""

    colour: str
    dash: str
    width: float

    @property
    def tint(self) -> str:
        """The colour of the strategy's bands."""
        red, green, blue = (int(self.colour[index : index + 2], 16) for index in (1, 3, 5))
        return f"rgba({red}, {green}, {blue}, 0.16)"


def looks(study: Study) -> dict[str, Look]:
    """A look for each strategy. The baseline is a broad solid line, which stays visible under the dashed lines of others."""
    return {
        name: Look(colour, DASHES[index % len(DASHES)], 2 if index else 4)
        for index, (name, colour) in enumerate(colours(study.baseline, study.others).items())
    }


def curves(
    study: Study,
    styles: dict[str, Look],
    curve: Callable[[Run], pd.Series],
    *,
    position: Callable[[float], float] = float,
    legend: bool = True,
) -> Iterator[go.Scatter]:
    """Mean and range over the finished runs of each strategy; every other run as its own line, up to its last finite value."""
    for name in [study.baseline, *study.others]:
        finished = study.finished(name)
        if finished:
            runs = pd.concat([curve(run) for run in finished], axis=1, join="inner")
            x = [position(step) for step in runs.index]
            if len(finished) > 1:
                yield ribbon(x, list(runs.min(axis=1)), list(runs.max(axis=1)), name, styles[name])
            line = line_of(x, list(runs.mean(axis=1)), name, styles[name], "%{y:.4g}")
            yield line.update(showlegend=legend, text=[f"step {step}" for step in runs.index])
        for run in study.runs[name].values():
            values = curve(run)
            if not run.finished and len(values):
                label = f"{name}, seed {run.seed}, {run.train.status}"
                lost = line_of([position(step) for step in values.index], list(values), label, styles[name], "%{y:.4g}")
                marker = {"symbol": "x", "size": [0] * (len(values) - 1) + [10], "opacity": 1}
                yield lost.update(mode="lines+markers", marker=marker, line={"dash": "dot", "width": 1.5}, showlegend=legend)


def line_of(x: Sequence[float], y: Sequence[float], name: str, look: Look, value: str) -> go.Scatter:
    """One line of a strategy; `value` is the format in which hovering shows y."""
    line = {"color": look.colour, "width": look.width, "dash": look.dash}
    return go.Scatter(x=x, y=y, name=name, legendgroup=name, mode="lines", line=line, hovertemplate=value)


def ribbon(x: list[float], low: list[float], high: list[float], name: str, look: Look) -> go.Scatter:
    """A band between two lines."""
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=look.tint,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=name,
        showlegend=False,
    )


def band(study: Study) -> str:
    """A sentence that explains line and band of `curves`."""
    count = len(study.seeds)
    return f"Line: mean; band: lowest to highest of {counted(count, 'seed')}." if count > 1 else "One seed."


def finish(plot: go.Figure, **layout: Any) -> None:
    """Apply the layout that all figures share. The page draws the legends, above the figures."""
    margin = {"l": 64, "r": 16, "t": 12, "b": 48, **layout.pop("margin", {})}
    shared = {"template": go.layout.Template(), "font": {"size": 12}, "hovermode": "x unified"}
    plot.update_layout({**shared, "margin": margin, **layout})
    plot.update_annotations(font={"size": 13})
    for update in (plot.update_xaxes, plot.update_yaxes):
        update(automargin=True, title={"font": {"size": 12}, "standoff": 8})

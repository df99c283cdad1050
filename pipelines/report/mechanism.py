"""Figures of the mechanism: which weights learn when, signal and conditioning at the start, symmetry, gates and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dit.analysis.series import (
    NOISE_WINDOW,
    by_block,
    by_step,
    diagnosed,
    gradient_grid,
    mean_over_weights,
    movement_by_width,
    noise_by_step,
)
from dit.analysis.wakeup import by_kind, kind
from pipelines.report.drawing import TITLED, Figure, Look, band, curves, finish, line_of
from pipelines.report.runs import Analysis, Run, Study
from pipelines.report.words import fixed

PANELS = 5
"""The most heat maps side by side."""

ASLEEP = "rgba(128, 128, 128, 0.22)"
FIGURE_HEIGHT = 340

Panel = tuple[str, Callable[[Run], pd.Series]]
StartPanel = tuple[str, Callable[[Analysis], pd.Series]]


def wake_up(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """The first step at which each kind of weight receives a gradient, in every strategy."""
    starts = [study.analyses[name] for name in [study.baseline, *study.others]]
    measured = pd.DataFrame({start.strategy: by_kind(start.record.measured) for start in starts}, dtype=float)
    predicted = pd.DataFrame({start.strategy: _predicted(start) for start in starts})
    shown = measured.map(lambda step: "never" if math.isnan(step) else f"{step:.0f}")
    plot = go.Figure(
        go.Heatmap(
            x=list(measured.columns),
            y=list(measured.index),
            z=[[None if math.isnan(step) else step for step in row] for row in measured.to_numpy()],
            text=shown.to_numpy().tolist(),
            customdata=predicted.to_numpy().tolist(),
            texttemplate="%{text}",
            colorscale=[[0, "#2f9e6e"], [0.5, "#e0b02b"], [1, "#d9534f"]],
            showscale=False,
            hoverongaps=True,
            xgap=2,
            ygap=2,
            hovertemplate="%{y} in %{x}: first gradient at step %{text}<br>predicted: %{customdata}<extra></extra>",
        )
    )
    plot.update_xaxes(side="top", showgrid=False, ticks="")
    plot.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    finish(plot, height=80 + 24 * len(measured), hovermode="closest", margin={"t": 60, "l": 150})
    caption = (
        "The optimiser step, counted from 0, at which all weights of a kind first receive a gradient above rounding; "
        "never: not within the steps that were examined. Measured in float64 with the study's optimiser, without weight decay. "
        + _prediction(starts)
    )
    return Figure("wake-up", "Wake-up schedule: the first step with a gradient", caption, plot)


def _predicted(start: Analysis) -> dict[str, str]:
    """The predicted step of each kind of weight, in words."""
    if start.record.predicted is None:
        return dict.fromkeys(by_kind(start.record.measured), "not predicted")
    return {kind: "never" if step is None else f"step {step}" for kind, step in by_kind(start.record.predicted).items()}


def _prediction(starts: Sequence[Analysis]) -> str:
    """A sentence that says whether the measured schedules agree with the predicted ones."""
    if reasons := sorted({start.record.not_predicted for start in starts if start.record.not_predicted}):
        return f"Measured, not predicted. {' '.join(reasons)}"
    agree = all(start.record.predicted_equals_measured for start in starts)
    verdict = "agrees for every role" if agree else "does not agree for every role (see the cells)"
    return (
        "The prediction uses only the strategy and the architecture: a product with a zero factor passes no gradient back. It "
        f"{verdict}."
    )


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns for `count` panels: at most PANELS in a row, and rows as equal in length as possible."""
    rows = math.ceil(count / PANELS) or 1
    return rows, math.ceil(count / rows) or 1


def gradients(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """Which weights receive a gradient, and how large, over the first steps: one heat map for each strategy."""
    names = [name for name in study.runs if any(len(run.diagnostics) for run in study.runs[name].values())]
    rows, columns = _grid(len(names))
    plot = make_subplots(rows, columns, shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=names)
    for index, name in enumerate(names):
        grid = gradient_grid(pd.concat([run.diagnostics for run in study.runs[name].values()], ignore_index=True))
        steps = [str(step) for step in grid.columns]
        where = {"row": index // columns + 1, "col": index % columns + 1}
        awake = grid.where(grid > 0)
        plot.add_trace(
            go.Heatmap(
                x=steps,
                y=list(grid.index),
                z=[[0 if value == 0 else None for value in row] for row in grid.to_numpy()],
                colorscale=[[0, ASLEEP], [1, ASLEEP]],
                showscale=False,
                xgap=2,
                ygap=2,
                hovertemplate="%{y}<br>step %{x}: no gradient<extra>" + name + "</extra>",
            ),
            **where,
        )
        plot.add_trace(
            go.Heatmap(
                x=steps,
                y=list(grid.index),
                z=[[None if math.isnan(value) else math.log10(value) for value in row] for row in awake.to_numpy()],
                coloraxis="coloraxis",
                xgap=2,
                ygap=2,
                hovertemplate="%{y}<br>step %{x}: gradient RMS 10<sup>%{z:.1f}</sup><extra>" + name + "</extra>",
            ),
            **where,
        )
        plot.update_xaxes(title="step", type="category", **where)
    plot.update_xaxes(showgrid=False, ticks="")
    plot.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    title = {"text": "gradient RMS", "font": {"size": 12}}
    bar = {"title": title, "tickprefix": "10<sup>", "ticksuffix": "</sup>", "dtick": 1, "thickness": 12}
    finish(plot, height=60 + 400 * rows, hovermode="closest", margin={"t": 40, "l": 150})
    plot.update_layout(coloraxis={"colorscale": "Viridis", "colorbar": bar})
    caption = (
        "Root mean square of the gradient of each kind of weight, over all blocks and seeds, in the order of the network. "
        "Grey: every entry of the gradient is exactly zero, so the weights do not move."
    )
    return Figure("gradients", "Gradients over the first steps, and at the last", caption, plot)


def gradient_ranks(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """Ranks of the gradient of each kind of weight in the first steps."""
    names = [study.baseline, *study.others]
    rows, columns = _grid(len(names))
    plot = make_subplots(rows, columns, shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=names)
    for index, name in enumerate(names):
        table = study.analyses[name].gradients.dropna(subset=["stable_rank"])
        stable, numerical, ratio = (
            mean_over_weights(table, column, kind) for column in ("stable_rank", "numerical_rank", "update_ratio")
        )
        ratio = ratio.reindex_like(stable).map(lambda value: "weights are zero" if math.isnan(value) else f"{value:.2g}")
        where = {"row": index // columns + 1, "col": index % columns + 1}
        plot.add_trace(
            go.Heatmap(
                x=[str(step) for step in stable.columns],
                y=list(stable.index),
                z=stable.where(stable > 0).astype(object).where(stable > 0, None).to_numpy().tolist(),
                text=numerical.map(lambda rank: f"{rank:.0f}" if rank else "").to_numpy().tolist(),
                customdata=ratio.to_numpy().tolist(),
                texttemplate="%{text}",
                textfont={"size": 9},
                coloraxis="coloraxis",
                xgap=2,
                ygap=2,
                hovertemplate="%{y}<br>step %{x}: stable rank %{z:.1f}, numerical rank %{text}<br>"
                "update / weight: %{customdata}<extra>" + name + "</extra>",
            ),
            **where,
        )
        plot.update_xaxes(title="step", type="category", **where)
    plot.update_xaxes(showgrid=False, ticks="")
    plot.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    bar = {"title": {"text": "stable rank", "font": {"size": 12}}, "thickness": 12}
    finish(plot, height=60 + 400 * rows, hovermode="closest", margin={"t": 40, "l": 150})
    plot.update_layout(coloraxis={"colorscale": "Viridis", "colorbar": bar})
    caption = (
        "Colour: stable rank of the gradient, the squared Frobenius norm over the squared spectral norm; number: its numerical "
        "rank; both mean over blocks, in float64. Empty: no gradient. A gradient of many directions leaves no symmetry."
    )
    return Figure("gradient-ranks", "Ranks of the gradients in the first steps", caption, plot)


def depth(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """What each block adds to the stream at the start, and how large stream and gradient are, by depth."""
    panels: list[StartPanel] = [
        ("attention adds", lambda start: start.blocks["attn_contribution"]),
        ("MLP adds", lambda start: start.blocks["mlp_contribution"]),
        ("RMS of the stream", lambda start: start.blocks["stream_rms"]),
        ("RMS of its gradient", lambda start: start.blocks["gradient_rms"]),
    ]
    plot = _start_panels(study, styles, panels, "block")
    caption = (
        "Before training, on one batch. What a branch adds is its RMS over that of the residual stream that it adds to: 0 is a "
        "block that is the identity. Stream and its gradient are taken after each block."
    )
    return Figure("depth", "Signal by depth at the start", caption, plot)


def conditioning(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """How much the prediction depends on timestep and label before each of the first steps."""
    panels: list[StartPanel] = [
        ("another timestep", lambda start: start.early["timestep_sensitivity"]),
        ("another label", lambda start: start.early["label_sensitivity"]),
        ("loss of the batch (mean squared error)", lambda start: start.early["mse"]),
    ]
    plot = _start_panels(study, styles, panels, "optimiser step")
    caption = (
        "By how much the prediction changes (RMS, relative to its own RMS) if every sample gets another timestep, or another "
        "label, before each of the first optimiser steps. At 0, conditioning has no effect yet."
    )
    return Figure("conditioning", "Conditioning in the first steps", caption, plot)


def widths(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """The coordinate check: how far activations move in the first steps, by width."""
    panels: list[StartPanel] = [
        ("residual stream", lambda start: movement_by_width(start.coordinates, "block")),
        ("prediction", lambda start: movement_by_width(start.coordinates, "prediction")),
    ]
    plot = _start_panels(study, styles, panels, "width")
    plot.update_xaxes(
        type="log", tickvals=sorted({width for start in study.analyses.values() for width in start.coordinates["width"]})
    )
    plot.update_yaxes(type="log", rangemode="normal", exponentformat="power", dtick=1)
    exponents = [
        f"{name} {fixed(entry['start']['width_exponent'], 2, signed=True)}"
        for name, entry in summary["strategies"].items()
        if entry["start"]["width_exponent"] is not None
    ]
    caption = (
        "RMS of the change of activations since the start, after the first optimiser steps at one learning rate, in networks "
        "of two blocks (coordinate check, Yang et al. 2022). A flat line suits every width. "
        + (f"Powers of the width with which the prediction moves: {', '.join(exponents)}." if exponents else "")
    )
    return Figure("widths", "Coordinate check: does one learning rate suit every width?", caption, plot)


def units(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """How many hidden units of an MLP, attention heads of a block, and rows of the output projection differ from each other."""
    panels = [
        ("hidden units of an MLP", lambda run: diagnosed(run.diagnostics, "distinct_units/mlp")),
        ("attention heads of a block", lambda run: diagnosed(run.diagnostics, "distinct_units/attention_heads")),
        ("rows of the output projection", lambda run: diagnosed(run.diagnostics, "distinct_units/final_projection")),
    ]
    plot = _panels(study, styles, panels)
    plot.update_yaxes(type="log", tickvals=[2**power for power in range(16)])
    caption = f"Units that differ from every other, mean over blocks. {band(study)}"
    return Figure("units", "Symmetry: distinct units", caption, plot)


def gates(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """How far the gates open: by step, and by depth at the last step."""
    panels = [
        ("gates of attention", lambda run: diagnosed(run.diagnostics, "gates/attention")),
        ("gates of the MLPs", lambda run: diagnosed(run.diagnostics, "gates/mlp")),
    ]
    by_depth = [
        ("attention, by block at the end", lambda run: by_block(run.diagnostics, "gates/attention")),
        ("MLPs, by block at the end", lambda run: by_block(run.diagnostics, "gates/mlp")),
    ]
    plot = _panels(study, styles, [*panels, *by_depth])
    for column in (3, 4):
        plot.update_xaxes(title_text="block", dtick=1, row=1, col=column)
    caption = f"RMS of the gates over the samples of a batch, mean over blocks, or block by block. {band(study)}"
    return Figure("gates", "Gates", caption, plot)


def ranks(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """How many directions the head and the gates use, and how large updates are."""
    panels = [
        ("output projection", lambda run: diagnosed(run.diagnostics, "effective_rank/final_projection")),
        ("gates", lambda run: diagnosed(run.diagnostics, "effective_rank/gates")),
    ]
    plot = _panels(study, styles, panels)
    caption = (
        "Effective rank (tr A)² / tr A² of A = W Wᵀ (Bartlett et al. 2020), mean over blocks and branches; a zero matrix has "
        f"none. {band(study)}"
    )
    return Figure("ranks", "Effective rank", caption, plot)


def updates(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """Update-to-weight ratios, and the gradient noise scale."""
    panels = [
        ("MLPs: update / weight", lambda run: by_step(run.diagnostics, "update_ratio", ".mlp_in.weight")),
        ("output projection: update / weight", lambda run: by_step(run.diagnostics, "update_ratio", "final.projection.weight")),
        ("gradient noise scale, in samples", lambda run: noise_by_step(run.gradient_noise)),
    ]
    plot = _panels(study, styles, panels)
    plot.update_yaxes(type="log", exponentformat="power", dtick=1)
    caption = (
        "RMS of an update divided by the RMS of the weights that it changes, mean over blocks. Noise scale: trace of the "
        "covariance of a sample's gradient divided by the squared norm of the expected gradient (McCandlish et al. 2018), both "
        f"averaged over {NOISE_WINDOW} diagnosed steps; it is missing where these are too few. {band(study)}"
    )
    return Figure("updates", "Updates and gradient noise", caption, plot)


MECHANISM = (wake_up, gradients, gradient_ranks, depth, conditioning, widths, units, gates, ranks, updates)


def _panels(study: Study, styles: dict[str, Look], panels: list[Panel]) -> go.Figure:
    """Curves of all strategies, side by side."""
    plot = make_subplots(1, len(panels), horizontal_spacing=0.06, subplot_titles=[title for title, _ in panels])
    for column, (_, curve) in enumerate(panels, start=1):
        for trace in curves(study, styles, curve, legend=column == 1):
            plot.add_trace(trace, row=1, col=column)
    plot.update_xaxes(title="optimiser step")
    finish(plot, height=FIGURE_HEIGHT, margin={"t": TITLED})
    return plot


def _start_panels(study: Study, styles: dict[str, Look], panels: list[StartPanel], axis: str) -> go.Figure:
    """One line with markers for each strategy at its start, side by side."""
    plot = make_subplots(1, len(panels), horizontal_spacing=0.06, subplot_titles=[title for title, _ in panels])
    for column, (_, values) in enumerate(panels, start=1):
        for name in [study.baseline, *study.others]:
            curve = values(study.analyses[name])
            if len(curve):
                line = line_of(list(curve.index), list(curve), name, styles[name], "%{y:.4g}")
                plot.add_trace(line.update(mode="lines+markers", showlegend=column == 1), row=1, col=column)
    plot.update_xaxes(title=axis)
    plot.update_yaxes(rangemode="tozero")
    finish(plot, height=FIGURE_HEIGHT, margin={"t": TITLED})
    return plot

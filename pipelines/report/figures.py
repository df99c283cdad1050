"""Figures of results and training, as descriptions for Plotly; the page sets the colours of background, text and grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dit.analysis.comparison import METRICS, interval, relative_differences
from dit.analysis.series import SMOOTHING, bucket_ranges, final_buckets, smoothed
from pipelines.report.drawing import ERROR_AXIS, LOG_AXIS, TITLED, Figure, Look, band, curves, finish, line_of, looks, ribbon
from pipelines.report.mechanism import MECHANISM
from pipelines.report.runs import Run, Study
from pipelines.report.tuning import ANSWERS, EXPLAINED
from pipelines.report.words import MINUS, samples


def figures(study: Study, summary: dict[str, Any]) -> dict[str, Figure]:
    """Every figure for which the study has data, by name."""
    drawn = [*ANSWERS, differences, *EXPLAINED, validation, early, relative, training, buckets, *MECHANISM]
    found = (draw(study, summary, looks(study)) for draw in drawn)
    return {figure.name: figure for figure in found if _shows_something(figure)}


def _shows_something(figure: Figure) -> bool:
    return any(trace.x is not None and len(trace.x) for trace in figure.plot.data)


def differences(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """A forest plot: each strategy minus the baseline, with its interval and the single seeds."""
    rows = list(reversed(study.others))
    metrics = METRICS if study.evaluation else METRICS[:1]
    plot = make_subplots(1, len(metrics), shared_yaxes=True, horizontal_spacing=0.025)
    for column, metric in enumerate(metrics, start=1):
        traces = [
            trace for row, name in enumerate(rows) for trace in _forest(summary, name, metric.name, row, styles[name].colour)
        ]
        plot.add_traces(traces, rows=1, cols=column)
        better = "← better" if metric.lower_is_better else "better →"
        title = f"<b>{_capital(metric.label)}</b><br>{better}"
        plot.update_xaxes(_around_zero(traces, "x"), title=title, nticks=4, row=1, col=column)
    places = {"range": [-0.6, len(rows) - 0.4], "tickvals": list(range(len(rows))), "ticktext": rows}
    plot.update_yaxes(places, showgrid=False, zeroline=False)
    finish(plot, height=130 + 48 * len(rows), showlegend=False, hovermode="closest", margin={"b": 70, "t": 10})
    caption = (
        f"Each strategy minus {study.baseline}, paired by seed. Squares: mean with its 95 % interval, open where there is no "
        f"verdict. Open circles: single seeds."
        + (f" All but the validation error: {samples(summary)}." if study.evaluation else "")
    )
    return Figure("differences", f"Difference to {study.baseline} after training", caption, plot)


def _forest(summary: dict[str, Any], name: str, metric: str, row: int, colour: str) -> list[go.Scatter]:
    """The mean difference of one strategy in one metric with its interval, and below it the difference of each seed."""
    entry, base = summary["strategies"][name], summary["strategies"][summary["baseline"]]["runs"]
    found = entry["difference"][metric]
    if found["mean"] is None:
        return []
    values = {seed: (run[metric], base[seed][metric]) for seed, run in entry["runs"].items()}
    single = {seed: value - other for seed, (value, other) in values.items() if value is not None and other is not None}
    bounds = f" [{found['low']:+.4g}, {found['high']:+.4g}]".replace("-", MINUS) if found["low"] is not None else ""
    seeds = go.Scatter(
        x=list(single.values()),
        y=[row - 0.24] * len(single),
        mode="markers",
        marker={"color": colour, "size": 5, "opacity": 0.55, "symbol": "circle-open"},
        text=[f"{name}, seed {seed}" for seed in single],
        hovertemplate="%{text}: %{x:+.4g}<extra></extra>",
    )
    mean = go.Scatter(
        x=[found["mean"]],
        y=[row],
        mode="markers",
        marker={"color": colour, "size": 10, "symbol": "square-open" if found["verdict"] == "no verdict" else "square"},
        error_x=_arms(found, colour),
        hovertemplate=f"{name}: %{{x:+.4g}}{bounds}<br>{found['verdict']}, n = {found['n']}<extra></extra>",
    )
    return [seeds, mean]


def validation(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """Validation error of the trained and of the averaged weights by step."""
    titles = ("Trained weights", "EMA weights")
    plot = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)
    for column, weights in ((1, "model"), (2, "ema")):
        for trace in curves(study, styles, lambda run, weights=weights: run.validation(weights)["mse"], legend=column == 1):  # type: ignore[misc]
            plot.add_trace(trace, row=1, col=column)
    plot.update_xaxes(title="optimiser step")
    plot.update_yaxes(ERROR_AXIS, row=1, col=1)
    plot.update_yaxes(LOG_AXIS, row=1, col=2)
    finish(plot, height=390, margin={"t": TITLED})
    caption = f"Held-out latents, fixed noise and timesteps. {band(study)}"
    return Figure("validation", "Validation error by step", caption, plot)


def early(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """Validation error of the trained weights on a logarithmic step axis, which shows the start of training."""
    plot = go.Figure(list(curves(study, styles, lambda run: run.validation("model")["mse"], position=_log_position)))
    last = summary["study"]["steps"]
    powers = int(math.log2(last)) + 1
    ticks = [0, *(2**power for power in range(0, powers, math.ceil(powers / 10)))]
    axis = {"type": "log", "title": "optimiser step, logarithmic", "showgrid": False}
    plot.update_xaxes(axis, tickvals=[_log_position(step) for step in ticks], ticktext=[str(step) for step in ticks])
    plot.update_yaxes(ERROR_AXIS)
    moment = summary["study"]["target_second_moment"]
    label = {"text": f"zero output: {moment:.2f}", "font": {"size": 11}, "textposition": "end"}
    plot.add_hline(y=moment, line={"dash": "dot", "width": 1, "color": "#868e96"}, label=label)
    finish(plot, height=360)
    caption = f"Trained weights. Step 0 is before the first update. {band(study)}"
    return Figure("early", "Early training", caption, plot)


def relative(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """The paired difference to the baseline over training, as a fraction of the baseline's error."""
    plot = go.Figure()
    for name in study.others:
        curves = _paired(study, name, lambda run: run.validation("model")["mse"])
        curves = curves[curves.index >= (summary["compared_steps"] or [0])[0]]
        if curves.empty:
            continue
        mean = curves.mean(axis=1)
        if curves.shape[1] > 1:
            bounds = [interval(list(row)) for row in curves.to_numpy()]
            low, high = ([bound[side] for bound in bounds] for side in (0, 1))
            plot.add_trace(ribbon(list(curves.index), low, high, name, styles[name]))
        plot.add_trace(line_of(list(curves.index), list(mean), name, styles[name], "%{y:+.1%}"))
    plot.update_xaxes(title="optimiser step")
    means = [trace for trace in plot.data if trace.name]
    plot.update_yaxes(_around_zero(means, "y", room=0.3), title=f"validation error against {study.baseline}", tickformat="+.0%")
    finish(plot, height=360)
    bands = "Bands: 95 % interval at each step, cut off by the axis where wide. " if len(study.seeds) > 1 else ""
    caption = f"Trained weights, paired by seed. {bands}Above zero is worse than {study.baseline}."
    return Figure("relative", "How the difference evolves", caption, plot)


def training(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """Training error by step, lightly smoothed."""
    plot = go.Figure(list(curves(study, styles, lambda run: smoothed(run.training["mse"]))))
    plot.update_xaxes(title="optimiser step")
    plot.update_yaxes(ERROR_AXIS)
    finish(plot, height=360)
    caption = f"Smoothed: running mean of {SMOOTHING} logged steps. Batches are the same for every strategy. {band(study)}"
    return Figure("training", "Training error by step", caption, plot)


def buckets(study: Study, summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """Final validation error by range of timesteps, and its paired difference to the baseline."""
    titles = ("Error", f"Against {study.baseline}")
    plot = make_subplots(1, 2, horizontal_spacing=0.09, subplot_titles=titles)
    labels = _bucket_labels(study)
    for index, name in enumerate([study.baseline, *study.others]):
        shift = 0.09 * (index - len(study.others) / 2)
        places = [bucket + shift for bucket in range(len(labels))]
        errors = pd.DataFrame({run.seed: _last_buckets(run) for run in study.finished(name)})
        if errors.empty:
            continue
        arms = _range_arms(errors, styles[name].colour)
        points = _points(places, errors.mean(axis=1), name, styles[name], arms=arms, labels=labels, value="%{y:.4g}")
        plot.add_trace(points, row=1, col=1)
        paired = _paired(study, name, _last_buckets)
        if name != study.baseline and not paired.empty:
            arms = _interval_arms(paired, styles[name].colour)
            points = _points(places, paired.mean(axis=1), name, styles[name], arms=arms, labels=labels, value="%{y:+.1%}")
            plot.add_trace(points.update(showlegend=False), row=1, col=2)
    ranges = {"tickvals": list(range(len(labels))), "ticktext": labels}
    plot.update_xaxes(ranges, title="timestep, from clean to noise", showgrid=False, zeroline=False)
    plot.update_yaxes(ERROR_AXIS, row=1, col=1)
    plot.update_yaxes(_around_zero(list(plot.select_traces(row=1, col=2)), "y"), tickformat="+.0%", row=1, col=2)
    finish(plot, height=390, hovermode="closest", margin={"t": TITLED})
    intervals = ", right 95 % intervals, paired by seed" if len(study.seeds) > 1 else ""
    caption = f"EMA weights at the end of training. Bars: left the range over seeds{intervals}."
    return Figure("buckets", "Final validation error by timestep", caption, plot)


def _paired(study: Study, name: str, curve: Callable[[Run], pd.Series]) -> pd.DataFrame:
    """Each seed's curve minus the baseline's curve, as a fraction of the baseline's mean; one column for each seed."""
    curves, base = ({run.seed: curve(run) for run in study.finished(each)} for each in (name, study.baseline))
    return relative_differences(curves, base)


def _points(
    x: list[float], y: pd.Series, name: str, look: Look, *, arms: dict[str, Any], labels: list[str], value: str
) -> go.Scatter:
    """Markers with error bars, one for each of `labels`."""
    return go.Scatter(
        x=x,
        y=list(y),
        name=name,
        legendgroup=name,
        mode="markers",
        marker={"color": look.colour, "size": 8},
        error_y=arms,
        text=labels,
        hovertemplate=f"{name}, %{{text}}: {value}<extra></extra>",
    )


def _arms(found: dict[str, Any], colour: str) -> dict[str, Any]:
    if found["low"] is None:
        return {"visible": False}
    arms = {"array": [found["high"] - found["mean"]], "arrayminus": [found["mean"] - found["low"]]}
    return {"type": "data", "symmetric": False, **arms, "color": colour, "thickness": 2, "width": 6}


def _range_arms(values: pd.DataFrame, colour: str) -> dict[str, Any]:
    mean = values.mean(axis=1)
    arms = {"array": list(values.max(axis=1) - mean), "arrayminus": list(mean - values.min(axis=1))}
    return {"type": "data", "symmetric": False, **arms, "color": colour, "thickness": 1.5, "width": 3}


def _interval_arms(values: pd.DataFrame, colour: str) -> dict[str, Any]:
    if values.shape[1] < 2:
        return {"visible": False}
    arms = [(high - low) / 2 for low, high in (interval(list(row)) for row in values.to_numpy())]
    return {"type": "data", "array": arms, "color": colour, "thickness": 1.5, "width": 3}


def _around_zero(traces: list[go.Scatter], axis: str, room: float = 0.08) -> dict[str, Any]:
    """An axis for differences, with room for all traces and their error bars, that always includes zero."""
    ends = [0.0]
    for trace in traces:
        above = trace[f"error_{axis}"].array
        above = [0.0] * len(trace[axis]) if above is None else above
        below = trace[f"error_{axis}"].arrayminus
        below = above if below is None else below
        ends += [value + up for value, up in zip(trace[axis], above, strict=True)]
        ends += [value - down for value, down in zip(trace[axis], below, strict=True)]
    room *= max(ends) - min(ends)
    bounds = {"range": [min(ends) - room, max(ends) + room]} if room else {}
    return {"zeroline": True, "zerolinewidth": 2, **bounds}


def _last_buckets(run: Run) -> pd.Series:
    return final_buckets(run.validation("ema"))


def _bucket_labels(study: Study) -> list[str]:
    settings = study.first.train.settings
    ranges = bucket_ranges(settings.diffusion["num_timesteps"], settings.train["validation"]["buckets"])
    return [f"{low} to {high}" for low, high in ranges]


def _log_position(step: float) -> float:
    """The position of a step on a logarithmic axis; step 0 is placed left of step 1."""
    return float(step) if step >= 1 else 0.5


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

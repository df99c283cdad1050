"""Figures over all runs of a study: errors by learning rate, differences, delays, interactions, and the steps before spikes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dit.analysis.comparison import Estimate, ended
from dit.analysis.effects import cell_means
from dit.analysis.failures import QUANTITIES, average, before
from dit.analysis.study import STRATEGY, Pair, Place, Tuning
from dit.analysis.verdicts import Judgement
from pipelines.report.colours import PALETTE
from pipelines.report.drawing import DASHES, TITLED, Figure, Look, finish, ribbon
from pipelines.report.runs import Study
from pipelines.report.words import fixed, listed

PANELS = 9
"""The most places, strategies or factors in one figure; the tables hold all of them."""

POINTS = 60
"""A curve over training is drawn at no more than this many steps."""

RATE_COLOURS = ("#e3a11f", "#e0652b", "#c2365e", "#8a4fc0", "#3b7dd8", "#1aa3b0")
"""Learning rates from low to high: not the colours of strategies."""

BLACK = "#868e96"
FIGURE_HEIGHT = 330


def response(study: Study, _summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """The final error of every strategy by learning rate, with its optimum."""
    tunings = study.findings.tunings
    places = list(dict.fromkeys(one.place for one in tunings))[:PANELS]
    plot = _panels([place_label(place) for place in places])
    for index, place in enumerate(places):
        for one in tunings:
            if one.place == place:
                traces = [*_seeds(one, styles[one.strategy]), *_curve(one, styles[one.strategy], legend=index == 0)]
                for trace in traces:
                    plot.add_trace(trace, **_cell(index))
    rates = sorted({rate for one in tunings for rate in one.errors})
    plot.update_xaxes(_rate_axis(rates), title="learning rate")
    plot.update_yaxes(type="log", nticks=6)
    plot.update_yaxes(title="final validation error", col=1)
    _finish(plot, len(places))
    caption = (
        "EMA weights. Circles: single runs; line: geometric mean over seeds; diamond: the interpolated optimum with its 95 % "
        "interval, if it lies between measured rates. A cross marks a rate at which runs collapsed or diverged, so that there "
        f"is no mean.{_cut(len(places), len({one.place for one in tunings}), 'settings')}"
    )
    return Figure("response", "Final error by learning rate", caption, plot)


def _seeds(one: Tuning, look: Look) -> list[go.Scatter]:
    points = [(rate, value, seed) for rate, seeds in one.errors.items() for seed, value in seeds.items() if ended(value)]
    marker = {"color": look.colour, "size": 4, "opacity": 0.5, "symbol": "circle-open"}
    text = [f"{one.strategy}, seed {seed}" for _, _, seed in points]
    shared = {
        "mode": "markers",
        "legendgroup": one.strategy,
        "showlegend": False,
        "hovertemplate": "%{text}: %{y:.4g}<extra></extra>",
    }
    return [
        go.Scatter(x=[rate for rate, _, _ in points], y=[value for _, value, _ in points], marker=marker, text=text, **shared)
    ]


def _curve(one: Tuning, look: Look, legend: bool) -> list[go.Scatter]:
    if one.response is None:
        return []
    points = one.response.points
    line = {"color": look.colour, "width": look.width, "dash": look.dash}
    shared = {"name": one.strategy, "legendgroup": one.strategy}
    x, y = [point.rate for point in points], [point.mean for point in points]
    traces = [go.Scatter(x=x, y=y, mode="lines", line=line, showlegend=legend, hovertemplate="%{y:.4g}", **shared)]
    ended_at = [value for runs in one.errors.values() for value in runs.values() if ended(value)]
    if (lost := [point for point in points if point.failed]) and ended_at:
        traces.append(
            go.Scatter(
                x=[point.rate for point in lost],
                y=[max(ended_at)] * len(lost),
                mode="markers",
                marker={"symbol": "x", "size": 9, "color": look.colour},
                text=[f"{one.strategy}: {point.failed} of {point.failed + point.n} runs failed" for point in lost],
                hovertemplate="%{text}<extra></extra>",
                showlegend=False,
                **shared,
            )
        )
    best = one.response.optimum
    if best and not best.edge:
        arms: dict[str, Any] = {"visible": False}
        if best.interval:
            arms = {"type": "data", "symmetric": False, "array": [best.interval.high - best.rate]}
            arms |= {"arrayminus": [best.rate - best.interval.low], "color": look.colour, "thickness": 1.5}
        marker = {"symbol": "diamond", "size": 9, "color": look.colour}
        text = f"{one.strategy}: optimum {best}<extra></extra>"
        traces.append(
            go.Scatter(
                x=[best.rate],
                y=[best.error],
                mode="markers",
                marker=marker,
                error_x=arms,
                hovertemplate=text,
                showlegend=False,
                **shared,
            )
        )
    return traces


def same_rate(study: Study, _summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """The difference to the baseline in per cent by learning rate."""
    pairs = study.findings.pairs if study.findings.tunings else ()
    places = list(dict.fromkeys(pair.place for pair in pairs))[:PANELS]
    plot = _panels([place_label(place) for place in places])
    rates = sorted({pair.rate for pair in pairs})
    for index, place in enumerate(places):
        for number, name in enumerate(study.others):
            mine = [pair for pair in pairs if pair.place == place and pair.strategy == name and pair.judgement.mean is not None]
            nudge = 1 + 0.02 * (number - (len(study.others) - 1) / 2)
            if mine:
                trace = _difference([nudge * pair.rate for pair in mine], mine, name, styles[name])
                plot.add_trace(trace.update(showlegend=index == 0), **_cell(index))
    plot.update_xaxes(_rate_axis(rates), title="learning rate")
    plot.update_yaxes(zeroline=True, zerolinewidth=2, ticksuffix=" %", nticks=6)
    plot.update_yaxes(title=f"error against {study.baseline}", col=1)
    _finish(plot, len(places))
    caption = (
        f"By how many per cent the final validation error differs from that of {study.baseline} at the same learning rate, "
        "paired by seed, with 95 % intervals. Above zero is worse. If runs failed at a rate, there is no verdict, and the mean "
        f"is that of the pairs that ended well.{_cut(len(places), len({pair.place for pair in pairs}), 'settings')}"
    )
    return Figure("same-rate", "Each strategy at the same learning rate", caption, plot)


def _difference(x: list[float], pairs: Sequence[Pair], name: str, look: Look) -> go.Scatter:
    judged = [pair.judgement for pair in pairs]
    return go.Scatter(
        x=x,
        y=[100 * (one.mean or 0) for one in judged],
        name=name,
        legendgroup=name,
        mode="lines+markers",
        marker={
            "color": look.colour,
            "size": 8,
            "symbol": ["square" if one.answer != "no verdict" else "square-open" for one in judged],
        },
        line={"color": look.colour, "width": 1.5, "dash": look.dash},
        error_y=_arms(judged, look.colour),
        text=[one.answer for one in judged],
        hovertemplate=f"{name}: %{{y:+.2f}} %, %{{text}}<extra></extra>",
    )


def _arms(judged: Sequence[Judgement], colour: str) -> dict[str, Any]:
    """Error bars in per cent, of zero length if there is no interval."""
    up = [100 * (one.high - one.mean) if one.high is not None and one.mean is not None else 0 for one in judged]
    down = [100 * (one.mean - one.low) if one.low is not None and one.mean is not None else 0 for one in judged]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour, "thickness": 1.5, "width": 4}


def at_best(study: Study, _summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """Each strategy at its own best learning rate against the baseline at the baseline's best."""
    found = [one for one in reversed(study.findings.at_best) if one.judgement.mean is not None]
    labels = [", ".join(filter(None, (one.strategy, place_label(one.place)))) for one in found]
    plot = go.Figure()
    for row, one in enumerate(found):
        colour, judged = styles[one.strategy].colour, one.judgement
        symbol = "square-open" if judged.answer == "no verdict" else "square"
        plot.add_trace(
            go.Scatter(
                x=[100 * (judged.mean or 0)],
                y=[row],
                mode="markers",
                marker={"color": colour, "size": 10, "symbol": symbol},
                error_x=_arms([judged], colour),
                hovertemplate=f"{labels[row]}: %{{x:+.2f}} %, {judged.answer}, n = {judged.n}<extra></extra>",
            )
        )
    plot.update_xaxes(zeroline=True, zerolinewidth=2, ticksuffix=" %", title=f"error against {study.baseline}")
    plot.update_yaxes(
        range=[-0.6, len(found) - 0.4], tickvals=list(range(len(found))), ticktext=labels, showgrid=False, zeroline=False
    )
    finish(plot, height=130 + 34 * len(found), showlegend=False, hovermode="closest", margin={"t": 10})
    chosen = ", ".join(str(seed) for seed in study.params.study.choose_on)
    caption = (
        f"Seeds {chosen} chose the rates; the errors are those of the other seeds, paired, with 95 % intervals. Right of zero "
        f"is worse than {study.baseline}. An open square has no verdict; the table says why."
    )
    return Figure("at-best", "Each strategy at its own best learning rate", caption, plot)


def delays(study: Study, _summary: dict[str, Any], _styles: dict[str, Look]) -> Figure:
    """How many steps each strategy is behind the baseline over training, by learning rate, at the place that is shown."""
    place = study.shown(study.baseline).place
    pairs = [pair for pair in study.findings.pairs if pair.place == place and pair.curves and pair.curves.delay]
    names = list(dict.fromkeys(pair.strategy for pair in pairs))[:PANELS]
    rates = sorted({pair.rate for pair in pairs})
    plot = _panels(names)
    shown: set[float] = set()
    reach: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.strategy not in names or pair.curves is None or pair.curves.delay is None:
            continue
        trend, label, number = pair.curves.delay, f"learning rate {pair.rate:g}", rates.index(pair.rate)
        look = Look(RATE_COLOURS[number % len(RATE_COLOURS)], DASHES[number % len(DASHES)], 2)
        chosen = _thinned(len(trend.steps))
        x = [trend.steps[index] for index in chosen]
        values = [trend.values[index] for index in chosen]
        cell = _cell(names.index(pair.strategy))
        if all(value.low is not None for value in values):
            plot.add_trace(ribbon(x, _bounds(values, "low"), _bounds(values, "high"), label, look), **cell)
        line = {"color": look.colour, "width": look.width, "dash": look.dash}
        means = [value.mean for value in values]
        reach[pair.strategy] = [*reach.get(pair.strategy, [0.0]), *means]
        trace = go.Scatter(
            x=x, y=means, name=label, legendgroup=label, mode="lines", line=line, hovertemplate="%{y:+.0f} steps"
        )
        plot.add_trace(trace.update(showlegend=pair.rate not in shown), **cell)
        shown.add(pair.rate)
    for name, means in reach.items():
        room = 0.25 * (max(means) - min(means)) or 1.0
        plot.update_yaxes(range=[min(means) - room, max(means) + room], **_cell(names.index(name)))
    plot.update_xaxes(title=f"step of {study.baseline}")
    plot.update_yaxes(zeroline=True, zerolinewidth=2)
    plot.update_yaxes(title="steps behind", col=1)
    _finish(plot, len(names))
    at = f" At {place_label(place)}." if place else ""
    caption = (
        f"How many steps later a strategy reaches the error that {study.baseline} has at a step. Bands: 95 % interval over "
        "seeds, cut off by the axis where wide. If the line is level, the delay stays the same; if it rises, more training "
        f"does not make up for the difference.{at}{_cut(len(names), len({pair.strategy for pair in pairs}), 'strategies')}"
    )
    return Figure("delays", f"Steps behind {study.baseline} at equal error", caption, plot)


def _bounds(values: Sequence[Estimate], side: str) -> list[float]:
    return [getattr(value, side) for value in values]


def _thinned(count: int) -> list[int]:
    """At most `POINTS` of the indices 0 to `count` - 1, evenly spaced, with the first and the last."""
    if count <= POINTS:
        return list(range(count))
    return sorted({round(index * (count - 1) / (POINTS - 1)) for index in range(POINTS)})


def interactions(study: Study, _summary: dict[str, Any], styles: dict[str, Look]) -> Figure:
    """The mean error of each strategy at each level of each other factor."""
    effects = study.findings.effects
    others = [factor for factor in effects.factors if factor != STRATEGY][:PANELS] if effects and effects.found else []
    plot = _panels(others)
    for index, factor in enumerate(others):
        assert effects is not None
        means = cell_means(effects.factors, effects.runs, STRATEGY, factor)
        for name in effects.factors[STRATEGY]:
            levels = list(effects.factors[factor])
            y = [means[name, level].mean for level in levels]
            line = {"color": styles[name].colour, "width": styles[name].width, "dash": styles[name].dash}
            trace = go.Scatter(
                x=levels, y=y, name=name, legendgroup=name, mode="lines+markers", line=line, hovertemplate="%{y:.4g}"
            )
            plot.add_trace(trace.update(showlegend=index == 0), **_cell(index))
        plot.update_xaxes(type="category", title=factor, **_cell(index))
    plot.update_yaxes(type="log", nticks=6)
    plot.update_yaxes(title="final validation error", col=1)
    _finish(plot, len(others))
    left = f" Left out, as runs failed there: learning rate {listed(effects.left_out)}." if effects and effects.left_out else ""
    caption = (
        "Means over seeds and all other factors. If lines are parallel, the factor changes the error of every strategy by the "
        f"same ratio; if they are not, it does not.{left}"
    )
    return Figure("interactions", "Does another factor change what a start does?", caption, plot)


def map_of_differences(study: Study, _summary: dict[str, Any], _styles: dict[str, Look]) -> Figure:
    """The difference to the baseline by strategy and setting, if the study has a factor other than the learning rate."""
    pairs = study.findings.pairs if len(study.findings.places) > 1 else ()
    columns = list(dict.fromkeys((pair.place, pair.rate) for pair in pairs))
    with_rate = len({pair.rate for pair in pairs}) > 1
    labels = [", ".join(filter(None, (place_label(place), f"rate {rate:g}" if with_rate else ""))) for place, rate in columns]
    found: dict[tuple[str, Place, float], Judgement] = {(one.strategy, one.place, one.rate): one.judgement for one in pairs}
    cells = [[found.get((name, *column)) for column in columns] for name in study.others] if columns else []
    values = [[None if one is None or one.mean is None else 100 * one.mean for one in row] for row in cells]
    reach = max((abs(value) for row in values for value in row if value is not None), default=1)
    text = [["" if value is None else fixed(value, 1, signed=True) for value in row] for row in values]
    verdicts = [["not run" if one is None else f"{one.answer}, n = {one.n}" for one in row] for row in cells]
    plot = go.Figure(
        go.Heatmap(
            x=labels,
            y=study.others if columns else [],
            z=values,
            text=text,
            customdata=verdicts,
            texttemplate="%{text}" if len(columns) <= 16 else "",
            colorscale=[[0, "#2f9e6e"], [0.5, "#f4f4ef"], [1, "#d9534f"]],
            zmin=-reach,
            zmax=reach,
            colorbar={"ticksuffix": " %", "thickness": 12},
            xgap=2,
            ygap=2,
            hovertemplate="%{y} at %{x}: %{z:+.2f} %<br>%{customdata}<extra></extra>",
        )
    )
    plot.update_xaxes(type="category", showgrid=False, ticks="")
    plot.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    finish(plot, height=170 + 30 * len(study.others), hovermode="closest", margin={"t": 10, "l": 150})
    caption = (
        f"Final validation error against {study.baseline} at the same setting, in per cent. Empty: no pair of runs ended well."
    )
    return Figure("map", "Differences at every setting", caption, plot)


def warnings(study: Study, _summary: dict[str, Any], _styles: dict[str, Look]) -> Figure:
    """What moved in the last steps before spikes, by strategy; if runs failed, only before the spikes that led to failure."""
    tables: dict[str, list[Any]] = {}
    for name in study.strategies:
        mine = [one for (strategy, _), found in study.histories.items() for one in found if strategy == name]
        lost = [one for one in mine if one.failed_at is not None]
        found = [table for one in lost or mine if (table := before(one)) is not None]
        if found:
            tables[name] = found
    names = list(tables)[:PANELS]
    plot = _panels([f"{name}, {len(tables[name])} spikes" if len(tables[name]) > 1 else f"{name}, 1 spike" for name in names])
    words = {"gradient_norm": "gradient norm", "loss": "loss", "mse": "error"}
    for index, name in enumerate(names):
        table = average(tables[name])
        for number, quantity in enumerate(QUANTITIES):
            line = {"color": PALETTE[number], "width": 4 - number, "dash": DASHES[number]}
            x, y = [int(step) for step in table.index], [None if math.isnan(one) else float(one) for one in table[quantity]]
            trace = go.Scatter(
                x=x, y=y, name=words[quantity], legendgroup=quantity, mode="lines", line=line, hovertemplate="%{y:.2f}"
            )
            plot.add_trace(trace.update(showlegend=index == 0), **_cell(index))
    plot.update_xaxes(title="steps from the spike")
    plot.update_yaxes(type="log", nticks=6)
    plot.update_yaxes(title="over its median before", col=1)
    _finish(plot, len(names))
    caption = (
        "The last steps before a spike. Each quantity is divided by its median in the first half of these steps; lines are "
        "geometric means over runs. The spike is the one that led to the failure of a run, or if no run of a strategy failed, "
        "the first spike of each run."
    )
    return Figure("before-spikes", "What changed first before a spike", caption, plot)


ANSWERS = [same_rate, at_best, delays, response, map_of_differences]
"""The few figures that answer the question, at the top of the page."""

EXPLAINED = [interactions, warnings]


def place_label(place: Place) -> str:
    """`depth 4, optimizer muon`."""
    return ", ".join(f"{factor} {level}" for factor, level in place)


def _panels(titles: Sequence[str]) -> go.Figure:
    count = max(1, len(titles))
    rows, columns = math.ceil(count / 3), min(3, count)
    spacing = {"horizontal_spacing": 0.06, "vertical_spacing": min(0.16, 0.5 / rows)}
    return make_subplots(rows, columns, subplot_titles=[*titles] if any(titles) else None, **spacing)


def _cell(index: int) -> dict[str, Any]:
    return {"row": index // 3 + 1, "col": index % 3 + 1}


def _finish(plot: go.Figure, panels: int) -> None:
    rows = math.ceil(max(1, panels) / 3)
    finish(plot, height=46 + FIGURE_HEIGHT * rows, margin={"t": TITLED}, hovermode="closest")


def _rate_axis(rates: Sequence[float]) -> dict[str, Any]:
    return {"type": "log", "tickvals": list(rates), "ticktext": [f"{rate:g}" for rate in rates]}


def _cut(shown: int, all_of_them: int, noun: str) -> str:
    return "" if shown >= all_of_them else f" The first {shown} of {all_of_them} {noun}; the tables hold all."

"""One figure for each study of docs/evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dit.analysis.effects import Effect
from dit.analysis.response import Point
from dit.analysis.study import Findings, Pair, Place, Tuning
from pipelines.evidence.judging import BASELINE, Answers, FactorialAnswers, survived
from pipelines.evidence.results import Ended

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Colours that most colour-blind people tell apart. Okabe and Ito (2008), "Color Universal Design"."""
MARKERS = "osD^vPX"
CROSS = 0.02
"""The distance of crosses, as a share of an axis."""
TIMES = "\u00d7"
ABOVE = 16
"""Points between a panel and its title: room for the numbers of means that lie above the axis."""
WIDE = 0.5
"""A mean whose interval is wider than this share of it says little, and does not set the limits of an axis."""
LEVELS = {
    "schedule none": "no warm-up",
    "schedule 5_percent": "warm-up over 5 % of the steps",
    "use qknorm false": "without qk-norm",
    "use qknorm true": "with qk-norm",
    "optimizer beta2_0.95": "β₂ = 0.95",
    "optimizer beta2_0.999": "β₂ = 0.999",
}
"""Levels of factors as people say them."""


def draw(answers: Answers, path: Path) -> None:
    """Write the figure of a study as SVG, the same bytes for the same results."""
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "dit"}
    figure = _figure(answers)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _figure(answers: Answers) -> Figure:
    if answers.effects:
        if answers.effects.quantity == "survived":
            return _survival(answers)
        return _effects(answers.effects)
    if answers.delays is not None:
        return _lengths(answers.findings)
    return _responses(answers.findings)


def _responses(findings: Findings) -> Figure:
    """Final error by learning rate, one panel for each place.

    At the top edge are a cross where a run failed, and a number where a mean with a wide interval lies above the axis.
    """
    places = findings.places
    figure, panels = plt.subplots(1, len(places), figsize=(4.6 * len(places) + 1.6, 3.4), squeeze=False, layout="constrained")
    for place, axes in zip(places, panels[0], strict=True):
        tunings = [one for one in findings.tunings if one.place == place]
        for index, tuning in enumerate(tunings):
            _response(axes, tuning, index, index - (len(tunings) - 1) / 2)
        axes.set(xscale="log", xlabel="learning rate")
        points = [point for one in tunings for point in _points(one)]
        if means := [point.mean for point in points if point.mean is not None and not _wide(point)]:
            axes.set_ylim(*_around(means))
            _beyond(axes, tunings)
        axes.set_title(_words(place), pad=ABOVE)
        rates = sorted({rate for one in findings.tunings for rate in one.errors})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
    panels[0][0].set_ylabel("final validation error, mean over seeds")
    handles, labels = panels[0][-1].get_legend_handles_labels()
    if any(point.failed for one in findings.tunings for point in _points(one)):
        handles.append(Line2D([], [], color="0.3", marker="x", linestyle="none"))
        labels.append("a run failed")
    figure.legend(handles, labels, frameon=False, loc="outside right upper")
    return figure


def _wide(point: Point) -> bool:
    """Whether the interval of a mean is so wide that the mean says little, because some runs ended far above the others."""
    return point.mean is not None and (point.high or point.mean) - (point.low or point.mean) > WIDE * point.mean


def _beyond(axes: Axes, tunings: list[Tuning]) -> None:
    """Write the means that lie above the axis at its top edge."""
    for index, tuning in enumerate(tunings):
        for point in _points(tuning):
            if point.mean is not None and point.mean > axes.get_ylim()[1]:
                text, where = f"↑ {point.mean:.2g}", (point.rate, 1.01)
                colour = COLOURS[index % len(COLOURS)]
                axes.annotate(text, where, xycoords=axes.get_xaxis_transform(), ha="center", va="bottom", color=colour)


def _points(tuning: Tuning) -> tuple[Point, ...]:
    return () if tuning.response is None else tuning.response.points


def _around(means: list[float]) -> tuple[float, float]:
    """Limits of an axis that shows all means; a long interval is cut off, so that the means can be told apart."""
    margin = 0.1 * (max(means) - min(means))
    return min(means) - margin, max(means) + margin


def _response(axes: Axes, tuning: Tuning, index: int, place: float) -> None:
    """One curve. Its crosses stand `place` steps to the right of their rates, so that those of all starts can be seen."""
    if tuning.response is None:
        return
    style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    points = tuning.response.points
    means = [float(point.mean or math.nan) for point in points]  # where no run has an error, the curve has a gap
    below = [mean - (point.low or mean) for mean, point in zip(means, points, strict=True)]
    above = [(point.high or mean) - mean for mean, point in zip(means, points, strict=True)]
    rates = [point.rate for point in points]
    axes.errorbar(rates, means, (below, above), label=tuning.strategy, markersize=4, linewidth=1.2, capsize=2, **style)
    step = (max(tuning.errors) / min(tuning.errors)) ** CROSS
    failed = [point.rate * step**place for point in tuning.response.points if point.failed]
    if failed:
        axes.plot(failed, [0.99] * len(failed), "x", color=style["color"], clip_on=False, transform=axes.get_xaxis_transform())


def _lengths(findings: Findings) -> Figure:
    """The relative difference of the final errors against the length of the runs, with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
    for index, name in enumerate(dict.fromkeys(pair.strategy for pair in findings.pairs)):
        shown = [(int(dict(pair.place)["steps"]), pair) for pair in findings.of(name)]
        _difference(axes, sorted(shown, key=lambda one: one[0]), name, COLOURS[(index + 1) % len(COLOURS)])
    axes.axhline(0, color="0.5", linewidth=0.8)
    baseline = findings.question.baseline
    base = "the zero head" if baseline == BASELINE else baseline
    axes.set(xscale="log", xlabel="length of the run, steps", ylabel=f"final error, % higher than with {base}")
    axes.set_xticks(
        lengths := sorted({int(dict(pair.place)["steps"]) for pair in findings.pairs}), [f"{one:,}" for one in lengths]
    )
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def _difference(axes: Axes, shown: list[tuple[int, Pair]], name: str, colour: str) -> None:
    found = [(length, pair.judgement) for length, pair in shown if pair.judgement.mean is not None]
    means = [100 * (one.mean or 0.0) for _, one in found]
    below = [mean - 100 * (one.low or 0.0) for mean, (_, one) in zip(means, found, strict=True)]
    above = [100 * (one.high or 0.0) - mean for mean, (_, one) in zip(means, found, strict=True)]
    axes.errorbar(
        [length for length, _ in found], means, (below, above), label=name, color=colour, marker="o", capsize=3, linewidth=1.2
    )


def _effects(answers: FactorialAnswers) -> Figure:
    """Every effect with its 95 % interval: the declared ones filled, the others open."""
    declared = [one.effect for one in answers.declared]
    rows = [*declared, *answers.exploratory]
    figure, axes = plt.subplots(figsize=(8, 0.26 * len(rows) + 0.8), layout="constrained")
    for row, effect in enumerate(rows):
        found, filled = effect.estimate, effect in declared
        mean, low, high = (100 * (value or 0.0) for value in (found.mean, found.low, found.high))
        colour = COLOURS[0] if filled else "0.45"
        axes.errorbar(
            mean, row, xerr=[[mean - low], [high - mean]], color=colour, marker="o", mfc=colour if filled else "w", capsize=2
        )
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_named(effect) for effect in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"change of the error, % ({TIMES} = interaction; filled: declared before the runs)")
    return figure


def _named(effect: Effect) -> str:
    changes = zip(effect.factors, effect.levels, effect.reference, strict=True)
    return f" {TIMES} ".join(f"{factor}: {reference} → {level}" for factor, level, reference in changes)


def _survival(answers: Answers) -> Figure:
    """Heat maps of how many runs of each strategy and rate failed, one panel for each other combination."""
    runs = answers.results.runs
    places = list(dict.fromkeys(tuple(run.place) for run in runs))
    strategies = list(dict.fromkeys(run.strategy for run in runs))
    rates = sorted({run.rate for run in runs})
    figure, panels = plt.subplots(
        1, len(places), figsize=(2.5 * len(places) + 1.2, 2.6), squeeze=False, sharey=True, layout="constrained"
    )
    for place, axes in zip(places, panels[0], strict=True):
        _heat(axes, [run for run in runs if tuple(run.place) == place], strategies, rates)
        axes.set_title("\n".join(_level(*one) for one in place), fontsize=9)
        axes.set_xlabel("learning rate")
    figure.suptitle("runs that collapsed, diverged or never learned", fontsize=9)
    return figure


def _heat(axes: Axes, runs: list[Ended], strategies: list[str], rates: list[float]) -> None:
    cells: Mapping[tuple[str, float], list[Ended]] = {
        (name, rate): [run for run in runs if (run.strategy, run.rate) == (name, rate)] for name in strategies for rate in rates
    }
    share = [[_failed(cells[name, rate]) / max(1, len(cells[name, rate])) for rate in rates] for name in strategies]
    axes.imshow(share, cmap="OrRd", vmin=0, vmax=1, aspect="auto")
    for row, name in enumerate(strategies):
        for column, rate in enumerate(rates):
            text = f"{_failed(cells[name, rate])}/{len(cells[name, rate])}"
            axes.text(column, row, text, ha="center", va="center", color="w" if share[row][column] > 0.6 else "k")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(strategies)), strategies)


def _failed(runs: list[Ended]) -> int:
    return sum(survived(run) < 1 for run in runs)


def _words(place: Place) -> str:
    return ", ".join(_level(*one) for one in place)


def _level(factor: str, level: str) -> str:
    named = f"{factor} {level}"
    return LEVELS.get(named, named.replace("_", " "))

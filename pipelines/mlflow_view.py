"""Saved views of a study for MLflow's pages, with their columns and charts.

A saved view is a tag of the experiment, which MLflow's pages read; `tests/test_tracking.py` checks that the installed version
still reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

SHARED = "mlflow.sharedViewState."
"""The prefix of the name of a tag that holds a view."""
CURVE = "validation/mse"
FINAL, INITIAL, DIFFERENCE = "result/validation_mse", "result/initial_validation_mse", "result/difference_to_baseline_percent"
FACTORS, MEANS = "-factors", "-means"
"""Suffixes of the names of the other two views."""
SEVERAL = 2
TRAINING = "workflowType=machine_learning"
"""The part of an address that makes MLflow show its pages for training, not those for language models."""

Chart = dict[str, Any]
_LINE: Chart = {
    "scaleType": "log",
    "xAxisScaleType": "linear",
    "xAxisKey": "step",
    "yAxisKey": "metric",
    "yAxisExpressions": [],
    "range": {},
    "lineSmoothness": 0,
    "selectedXAxisMetricKey": "",
    "ignoreOutliers": False,
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}
"""Settings of a chart of curves by step, with errors on a logarithmic axis, on which strategies can be told apart."""


@dataclass(frozen=True)
class View:
    """The runs of one study in the UI: all runs with the tag `tag`.

    Runs are chosen by a tag, not by a list of ids, because the store limits the length of a view and a study may have hundreds
    of runs.
    """

    name: str
    factors: tuple[str, ...] = ()
    numeric: frozenset[str] = field(default_factory=frozenset)
    """The factors whose levels are numbers, so that they can be an axis."""

    @property
    def key(self) -> str:
        """The name in a form that addresses and tags allow."""
        return re.sub(r"[^A-Za-z0-9_-]", "-", self.name)

    @property
    def tag(self) -> str:
        """The tag of the runs in this view."""
        return f"view.{self.key}"

    def address(self, experiment_id: str) -> str:
        """The address at which the UI shows this view: the page of the experiment's runs, as charts."""
        return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={self.key}&compareRunsMode=CHART&{TRAINING}"


def show_in(client: MlflowClient, view: View, runs: Collection[Run], others: Iterable[Run]) -> None:
    """Add `runs` to a view, and remove those of `others` that are no longer in the study."""
    for run in runs:
        if view.tag not in run.data.tags:
            client.set_tag(run.info.run_id, view.tag, "yes")
    shown = {run.info.run_id for run in runs}
    for run in others:
        if run.info.run_id not in shown and view.tag in run.data.tags:
            client.delete_tag(run.info.run_id, view.tag)


def save(client: MlflowClient, experiment: Experiment, view: View, metrics: Iterable[str]) -> str:
    """Save a view and the two others among the "Views" of the UI; return the first one's address. Runs have `metrics`."""
    charts = {
        "": _charts(view, open_="answer"),
        FACTORS: _charts(view, open_="factors"),
        MEANS: _charts(view, open_="answer"),
    }
    folded = sorted({name.rpartition("/")[0] for name in metrics})
    for ending, (sections, cards) in charts.items():
        state = {
            "searchFilter": f"tags.`{view.tag}` = 'yes'",
            "orderByKey": f"metrics.`{FINAL}`",
            "orderByAsc": True,
            "selectedColumns": _columns(view),
            "runsHiddenMode": "SHOWALL",
            "isAccordionReordered": True,
            "compareRunCharts": cards,
            "compareRunSections": [*sections, *(_section(name, shown=False) for name in folded)],
            "groupBy": _by_strategy(view) if ending == MEANS else None,
        }
        _save(client, experiment, view.name + ending, view.key + ending, state)
    return view.address(experiment.experiment_id)


def _save(client: MlflowClient, experiment: Experiment, name: str, key: str, state: dict[str, Any]) -> None:
    """Save one view in the format of `mlflow/server/js`; settings that are left out have the UI's defaults."""
    saved = json.dumps({"name": name, "createdAt": experiment.creation_time, "state": json.dumps(state)})
    if experiment.tags.get(SHARED + key) != saved:
        client.set_experiment_tag(experiment.experiment_id, SHARED + key, saved)


def _columns(view: View) -> list[str]:
    params = ["strategy", *view.factors, "seed", *(["train.steps"] if "train.steps" not in view.factors else [])]
    return [
        *(f"params.`{name}`" for name in params),
        *(f"metrics.`{name}`" for name in (FINAL, INITIAL, DIFFERENCE)),
        "tags.`outcome`",
    ]


def _by_strategy(view: View) -> dict[str, Any]:
    keys = [{"mode": "param", "groupByData": name} for name in ("strategy", *view.factors)]
    return {"aggregateFunction": "average", "groupByKeys": keys}


def _charts(view: View, open_: str) -> tuple[list[Chart], list[Chart]]:
    """The sections of charts that come first on the page, and their charts; only the section called `open_` is open."""
    answer = [
        _card("curve", "LINE", "Validation error by step", **_LINE, metricKey=CURVE),
        *(_against(factor) for factor in view.factors if factor in view.numeric),
        _card("final", "BAR", "Final validation error", metricKey=FINAL),
        _card("difference", "BAR", "Difference to the baseline at the same seed, in percent", metricKey=DIFFERENCE),
    ]
    factors = [
        _card(
            "parallel",
            "PARALLEL",
            "Factors and final validation error",
            selectedParams=["strategy", *view.factors, "seed"],
            selectedMetrics=[FINAL],
            showAllRuns=True,
        )
    ]
    numeric = [factor for factor in view.factors if factor in view.numeric]
    if len(numeric) >= SEVERAL:
        axes = {name: {"key": key, "type": "PARAM"} for name, key in zip(("xaxis", "yaxis"), numeric, strict=False)}
        height = {"key": FINAL, "type": "METRIC"}
        factors.append(_card("contour", "CONTOUR", "Final validation error by two factors", **axes, zaxis=height))
    named = {"answer": ("Validation error", answer), "factors": ("Factors", factors)}
    ordered = sorted(named, key=lambda section: section != open_)
    sections = [_section(named[section][0], shown=section == open_, uuid=section) for section in ordered]
    cards = [{**card, "metricSectionId": section} for section in ordered for card in named[section][1]]
    return sections, cards


def _against(factor: str) -> Chart:
    axes = {"xaxis": {"key": factor, "type": "PARAM"}, "yaxis": {"key": FINAL, "type": "METRIC"}}
    return _card(f"by-{factor}", "SCATTER", f"Final validation error by {factor}", **axes)


def _card(uuid: str, kind: str, title: str, **settings: Any) -> Chart:
    return {
        "uuid": uuid,
        "type": kind,
        "displayName": title,
        "runsCountToCompare": 500,
        "deleted": False,
        "isGenerated": False,
        **settings,
    }


def _section(name: str, *, shown: bool, uuid: str = "") -> dict[str, Any]:
    more = {"isReordered": True, "deleted": False, "isGenerated": not uuid}
    return {"uuid": uuid or f"section-{name}", "name": name, "display": shown, **more}

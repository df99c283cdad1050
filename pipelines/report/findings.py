"""Findings over all runs of a study as data for `summary.json`: responses, verdicts, delays, effects, failures."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dit.analysis.delay import Trend
from dit.analysis.failures import Failures, count
from dit.analysis.study import AtBest, Effects, Pair, Tuning
from pipelines.report.judging import shown
from pipelines.report.runs import Study


def findings(study: Study) -> dict[str, Any]:
    """All findings of `dit.analysis.study` and `dit.analysis.failures`, without curves and single seeds."""
    found = study.findings
    return {
        "choose_on": study.params.study.choose_on,
        "declared": study.params.study.primary,
        "responses": [_tuning(one) for one in found.tunings],
        "same_rate": [_pair(one) for one in found.pairs],
        "each_at_its_best": [_at_best(one) for one in found.at_best],
        "effects": _effects(found.effects) if found.effects else None,
        "failures": [asdict(one) for one in failures(study)],
    }


def failures(study: Study) -> list[Failures]:
    """How runs ended, by strategy and learning rate, over all other factors."""
    return [count(histories) for histories in study.histories.values()]


def _tuning(one: Tuning) -> dict[str, Any]:
    response = asdict(one.response) if one.response else {}
    sensitivity = asdict(one.sensitivity) if one.sensitivity else None
    return {"strategy": one.strategy, "place": dict(one.place), **response, "sensitivity": sensitivity, "problem": one.problem}


def _pair(one: Pair) -> dict[str, Any]:
    delay = None
    if one.curves:
        names = one.judgement.comparison.strategy, one.judgement.comparison.baseline
        delay = {
            "kind": one.curves.kind,
            "clear": one.clear,
            "steps": _trend(one.curves.delay) if one.curves.delay else None,
            "log_ratio": _trend(one.curves.gap),
            "sentence": one.curves.sentence(*names),
        }
    place = {"strategy": one.strategy, "place": dict(one.place), "learning_rate": one.rate}
    return {**place, **shown(one.judgement), "delay": delay, "no_delay": one.problem}


def _trend(trend: Trend) -> dict[str, Any]:
    return {"mean": asdict(trend.mean), "change": asdict(trend.change), "course": trend.course}


def _at_best(one: AtBest) -> dict[str, Any]:
    rates = {"learning_rate": one.tuned.rate, "baseline_learning_rate": one.tuned.baseline_rate}
    return {"strategy": one.strategy, "place": dict(one.place), **rates, **shown(one.judgement)}


def _effects(effects: Effects) -> dict[str, Any]:
    found = effects.found
    return {
        "factors": {factor: list(levels) for factor, levels in effects.factors.items()},
        "main": [{**asdict(one), "sentence": str(one)} for one in found.main] if found else [],
        "interactions": [{**asdict(one), "sentence": str(one)} for one in found.interactions] if found else [],
        "left_out_rates": list(effects.left_out),
        "problem": effects.problem,
    }

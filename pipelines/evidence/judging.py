"""The answers of a study of docs/evidence, from its results: declared comparisons and effects, and exploratory ones."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit import yamlfile
from dit.analysis.comparison import Estimate
from dit.analysis.declared import JudgedEffect, judge_effects
from dit.analysis.delay import delays_by_length
from dit.analysis.effects import Effect, Factorial, factorial
from dit.analysis.study import RATE, STRATEGY, Findings, Question, find
from dit.errors import UserError
from pipelines.evidence.results import RESULTS, Ended, Results

QUESTIONS = RESULTS / "questions.yaml"
BASELINE = "adaln_zero"
LEARNED = 0.5
"""A run whose final error is above this share of the error of a zero output has not learned: it survived none of its steps."""


@dataclass(frozen=True)
class FactorialAnswers:
    """Declared main effects, and all other effects of the same runs.

    `quantity` is `error`, the final validation error, for which effects are ratios; or `survived`, the share of its steps that
    a run took before it failed, for which effects are differences.
    """

    quantity: str
    declared: list[JudgedEffect]
    everything: Factorial
    factors: dict[str, list[str]]

    @property
    def exploratory(self) -> list[Effect]:
        """Main effects that were not declared, and interactions."""
        asked = {one.effect for one in self.declared}
        return [*(effect for effect in self.everything.main if effect not in asked), *self.everything.interactions]


@dataclass(frozen=True)
class Answers:
    """The answers of one study. `findings` compare strategies by rate; `effects` and `delays` are None if not asked for."""

    results: Results
    findings: Findings
    effects: FactorialAnswers | None
    delays: dict[str, dict[int, Estimate | None]] | None


def questions(root: Path) -> dict[str, dict[str, Any]]:
    """The declared questions of each study, in addition to those in its profile."""
    found: dict[str, dict[str, Any]] = yamlfile.read(root / QUESTIONS, QUESTIONS)
    return found


def answer(results: Results, asked: Mapping[str, Any]) -> Answers:
    """The answers of one study to its entry in `questions`. Raises `UserError` if its runs do not fit the question."""
    values = results.values
    question = Question(
        values.get("study.baseline", BASELINE),
        values["study.strategies"],
        values.get("study.declared", []),
        values.get("study.choose_on", []),
    )
    findings = find([run.trained() for run in results.runs], question)
    effects = _effects(results, asked["effects"]) if "effects" in asked else None
    return Answers(results, findings, effects, _delays(results, question) if asked.get("lengths") else None)


def survived(run: Ended) -> float:
    """The share of its steps that a run took before it collapsed or diverged; 0 if it never learned."""
    if run.failed_at is not None:
        return run.failed_at / run.length
    assert run.error is not None
    return 0.0 if run.error > LEARNED * run.zero_output_error else 1.0


def _effects(results: Results, asked: Mapping[str, Any]) -> FactorialAnswers:
    by_error = asked["quantity"] == "error"
    named: Mapping[str, Mapping[str, str]] = asked.get("strategies", {})
    factors: dict[str, list[str]] = {factor: [] for factor in asked["factors"]}
    table: dict[tuple[Hashable, ...], dict[int, float | None]] = {}
    for run in results.runs:
        if named and run.strategy not in named:
            continue  # a control
        levels = {**dict(run.place), RATE: f"{run.rate:g}", STRATEGY: run.strategy, **named.get(run.strategy, {})}
        for factor, seen in factors.items():
            if levels[factor] not in seen:
                seen.append(levels[factor])
        key = tuple(levels[factor] for factor in factors)
        table.setdefault(key, {})[run.seed] = run.error if by_error else survived(run)
    found = factorial(factors, table, "ratio" if by_error else "difference")
    return FactorialAnswers(asked["quantity"], judge_effects(found, asked["declared"]), found, factors)


def _delays(results: Results, question: Question) -> dict[str, dict[int, Estimate | None]]:
    ends: dict[str, dict[int, dict[int, float]]] = {}
    for run in results.runs:
        if run.error is not None:
            ends.setdefault(run.strategy, {}).setdefault(run.length, {})[run.seed] = run.error
    base = ends.get(question.baseline)
    if base is None:
        raise UserError(f"no run of {question.baseline} ended well, so nothing can be late against it")
    return {name: delays_by_length(ends[name], base) for name in question.declared if name in ends}

"""Write the page of answers, docs/evidence/answers.md, and the same numbers as JSON, from the results of all studies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit.analysis.effects import Effect
from dit.analysis.study import AtBest, Findings, Pair, Place
from dit.analysis.verdicts import Judgement
from pipelines.evidence.figures import draw
from pipelines.evidence.judging import Answers, answer, questions, survived
from pipelines.evidence.results import RESULTS, Ended, Results
from pipelines.files import write_json
from pipelines.report.words import MINUS

PAGE = RESULTS / "answers.md"
NUMBERS = RESULTS / "answers.json"
DIGITS = 8
"""Significant digits of the numbers in `answers.json`."""
FIGURES = RESULTS / "figures"
HYPHEN = re.compile(r"(?<=[\s\[(])-(?=\d)")
"""A hyphen that stands for a minus sign."""
HEAD = """\
# Answers

`python -m pipelines.evidence write` makes this page from the results in this folder. What each study asks, and what its answers
would mean, was committed before it ran: [README.md](README.md). Only a declared comparison or effect has a verdict. Everything
else is exploratory, and its p-values are not corrected. Intervals are 95 %, by Student's t over seeds. "Error" is the final
validation error of the averaged weights. The conditions in the first line of a section (network, data, steps) hold for all its
tables, unless the column "factors" says otherwise.

- **a difference**: how much higher the error of a start is than that of the published start, `adaln_zero`, in %. The start is
  "worse" or "better" if the corrected p-value is below 5 %. A comparison without a verdict still has a difference, over the
  seeds at which neither run failed, but nothing can be concluded from it.
- **best learning rate**: the minimum of a parabola through three measured rates, over all seeds. The seeds that choose a rate
  for a verdict are fewer, so their best rate may be another one.
- **an effect**: the change of the error in %, or of the share of its steps that a run survives, if one factor changes and all
  others are averaged. It is "clear" if the corrected p-value is below 5 %. *A combined with B* is an interaction: how much more
  the change A does if the change B is made, too. In `stability`, `5_percent` is a warm-up over 5 % of the steps.
- **late by**: how many more steps a start needs to reach the error at which the published start ends; if negative, how many
  fewer.
- **what had changed most before a failure**: the names are those of the measurements in `stability.csv`, which
  [stability.md](../stability.md) explains.
- **starts of `attribution`**: `gates0` has zero gates, `gates1` open gates, `outputs0` open gates with zero residual outputs.
  `mod0` has zero shift and scale, `mod03` 0.3 RMS. `head0` has a zero head, `headx` a Xavier head. In `dead_blocks`, a control,
  the blocks never learn.
"""


def write(root: Path) -> list[str]:
    """Write the page, its figures and `answers.json`; returns the names of the studies that have results."""
    asked = questions(root)
    found = {name: root / RESULTS / f"{name}.json" for name in asked}
    answers = {name: answer(Results.read(path), asked[name]) for name, path in found.items() if path.exists()}
    (root / FIGURES).mkdir(exist_ok=True)
    for name, one in answers.items():
        draw(one, root / FIGURES / f"{name}.svg")
    sections = [_section(name, asked[name]["title"], one) for name, one in answers.items()]
    (root / PAGE).write_text("\n".join([HEAD, *sections]))
    write_json(root / NUMBERS, {name: [_rounded(one) for one in _declared(found)] for name, found in answers.items()})
    return list(answers)


def _section(name: str, title: str, answers: Answers) -> str:
    results = answers.results
    lines = [f"## `{name}`: {title}", "", _conditions(name, results), ""]
    if not answers.complete:
        lines += [f"**Cut: {len(results.runs)} of {results.planned} runs have ended. Its verdicts are not to be quoted.**", ""]
    lines += _of_declared(answers)
    if late := [f"- {sentence}" for sentence in _of_delays(answers)]:
        lines += [*late, ""]
    lines += [f"![{title}](figures/{name}.svg)", "", *_tables(answers), ""]
    return HYPHEN.sub(MINUS, "\n".join(lines))


def _conditions(name: str, results: Results) -> str:
    first, made = results.runs[0], results.made
    lengths = sorted({run.length for run in results.runs})
    steps = f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}"
    seeds = len({run.seed for run in results.runs})
    minutes = sum(one.minutes for one in made)
    failed = sum(run.status != "finished" for run in results.runs) or "none"
    return (
        f"{first.network} on {first.data}, {steps} steps, {seeds} seeds, {len(results.runs)} runs; {failed} collapsed "
        f"or diverged. {minutes:.1f} minutes of one {made[0].device}, torch {made[0].torch}, {made[0].workers} runs at a time. "
        f"Latents `{made[0].data.get('data/latents', '')[:12]}`, code `{made[0].code[:12]}`. "
        f"Command: `python -m pipelines.evidence run {name}`."
    )


def _of_declared(answers: Answers) -> list[str]:
    """A table of the declared answers, with the conditions that the section's first line does not state."""
    lines = []
    if answers.effects and (effects := answers.effects.declared):
        unit = "final error" if answers.effects.quantity == "error" else "share of its steps that a run survives"
        p = f"p, Holm-corrected for {len(effects)} effects"
        verdicts = ("clear" if one.clear else "not distinguishable" for one in effects)
        rows = [(*_change(one.effect), verdict, _p(one.p)) for one, verdict in zip(effects, verdicts, strict=True)]
        lines += [*_table(("declared effect", f"change of the {unit}", "verdict", p), rows), ""]
    if declared := [one for one in _compared(answers.findings) if one.judgement.comparison.declared]:
        difference = f"difference of the error from `{answers.findings.question.baseline}`"
        p = "p" if len(declared) == 1 else f"p, Holm-corrected for {len(declared)} comparisons"
        columns = ("declared comparison", "factors", "learning rate", difference, "seeds", "verdict", p)
        lines += [*_table(columns, [_row(one) for one in declared]), ""]
    return lines


def _row(one: AtBest | Pair) -> tuple[str, ...]:
    found = one.judgement
    verdict = f"{found.answer}: {found.reason}" if found.reason else found.answer
    p = "" if found.p is None else _p(found.p)
    rate = found.comparison.conditions.rate.removeprefix("at learning rate ")
    return f"`{one.strategy}`", _words(one.place), rate, _size(found), str(found.n), verdict, p


def _change(effect: Effect) -> tuple[str, str]:
    """What an effect changes, in words, and its size."""
    changes = zip(effect.factors, effect.levels, effect.reference, strict=True)
    words = " *combined with* ".join(f"{factor}: {level} instead of {reference}" for factor, level, reference in changes)
    return words, str(effect).rpartition(": ")[2]


def _of_delays(answers: Answers) -> Iterator[str]:
    """By how many steps the declared strategies are late, in words."""
    baseline = answers.findings.question.baseline
    for name, delays in (answers.delays or {}).items():
        for length, found in delays.items():
            if found is None:
                yield f"Exploratory: at none of the lengths does {name} reach the error of {baseline} after {length:,} steps."
            else:
                interval = "" if found.low is None or found.high is None else f" [{found.low:+,.0f}, {found.high:+,.0f}]"
                yield (
                    f"Exploratory: {name} reaches the error that {baseline} has after {length:,} steps late by "
                    f"{found.mean:+,.0f} steps{interval}, n = {found.n} seeds."
                )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown, without the columns that are empty in every row."""
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    header, *body = (f"| {' | '.join(cells[index] for index in kept)} |" for cells in (columns, *rows))
    return [header, "|---" * len(kept) + "|", *body]


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def _compared(findings: Findings) -> list[AtBest | Pair]:
    return [*findings.at_best, *findings.pairs]


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with numbers rounded to `DIGITS` digits: other kinds of processors add in another order, and differ beyond."""
    return {key: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for key, value in values.items()}


def _declared(answers: Answers) -> Iterator[Mapping[str, Any]]:
    """Every declared answer as numbers, which a second program must reproduce."""
    if answers.effects:
        for effect in answers.effects.declared:
            found = effect.effect.estimate
            yield {
                "effect": dict(zip(effect.effect.factors, map(str, effect.effect.levels), strict=True)),
                "verdict": "clear" if effect.clear else "not distinguishable",
                "mean": found.mean,
                "low": found.low,
                "high": found.high,
                "n": found.n,
                "p": effect.p,
            }
    for one in _compared(answers.findings):
        judgement = one.judgement
        if judgement.comparison.declared:
            yield {
                "strategy": one.strategy,
                "place": dict(one.place),
                "rate": None if isinstance(one, AtBest) else one.rate,
                "verdict": judgement.answer,
                "mean": judgement.mean,
                "low": judgement.low,
                "high": judgement.high,
                "n": judgement.n,
                "p": judgement.p,
            }


def _tables(answers: Answers) -> list[str]:
    first = _of_effects(answers) if answers.effects else _of_optima(answers.findings)
    by_survival = answers.effects is not None and answers.effects.quantity == "survived"
    return [*first, "", *([] if by_survival else _of_rates(answers.findings))]


def _of_effects(answers: Answers) -> list[str]:
    assert answers.effects is not None
    rows = [(*_change(effect), f"{effect.p_value:.2g}") for effect in answers.effects.exploratory]
    lines = _table(("exploratory effect", "size", "p, not corrected"), rows)
    if answers.effects.quantity == "survived":
        lines += ["", *_of_failures(answers.results.runs)]
    return lines


def _of_failures(runs: list[Ended]) -> list[str]:
    """A table of the indicators that had changed most before a run failed, with counts."""
    failed = [run for run in runs if survived(run) < 1 and run.warned is not None]
    moved: dict[str, int] = {}
    for run in failed:
        sign = (run.warned.sign or {}).get("indicator", "nothing that was diagnosed") if run.warned else ""
        moved[sign] = moved.get(sign, 0) + 1
    columns = ("what had changed most at the last diagnosis before a failure", f"runs, of {len(failed)} that failed")
    return _table(
        columns, [(name.replace("_", " "), str(count)) for name, count in sorted(moved.items(), key=lambda one: -one[1])]
    )


def _of_optima(findings: Findings) -> list[str]:
    if not findings.tunings:
        return []
    near = "rates within 1 % of the lowest error"
    rows = []
    for one in findings.tunings:
        cells = (one.problem or "", "", "")
        if found := one.response:
            stable = "none" if found.largest_stable is None else f"{found.largest_stable:g}"
            cells = (str(found.optimum or "none"), str(found.near_best or "none"), stable)
        rows.append((f"`{one.strategy}`", _words(one.place), *cells))
    return _table(("start", "factors", "best learning rate", near, "largest rate without a failure"), rows)


def _of_rates(findings: Findings) -> list[str]:
    """Each strategy against the baseline at every place and rate."""
    rates = sorted({pair.rate for pair in findings.pairs})
    rows = []
    for name in dict.fromkeys(pair.strategy for pair in findings.pairs):
        for place in findings.places:
            by_rate = {pair.rate: pair.judgement for pair in findings.of(name) if pair.place == place}
            if by_rate:
                cells = (_cell(by_rate[rate]) if rate in by_rate else "" for rate in rates)
                rows.append((f"`{name}`", _words(place), *cells))
    first, *others = (f"at rate {rate:g}" for rate in rates)
    difference = f"difference of the error from `{findings.question.baseline}`"
    return _table(("start", "factors", f"{difference} {first}", *others), rows)


def _cell(judgement: Judgement) -> str:
    if failed := judgement.comparison.failed:
        return ", ".join(f"{count} run{'s' if count > 1 else ''} of {name} failed" for name, count in failed.items())
    return _size(judgement)


def _size(judgement: Judgement) -> str:
    """The mean difference and its interval, in per cent."""
    mean, low, high = (_percent(value or 0.0) for value in (judgement.mean, judgement.low, judgement.high))
    return f"{mean} % [{low}, {high}]"


def _percent(share: float) -> str:
    """A share in per cent with one decimal; a tiny share with one significant digit, so that its sign can be seen."""
    return f"{100 * share:+.1g}" if abs(share) < 0.0005 else f"{100 * share:+.1f}"


def _words(place: Place) -> str:
    return ", ".join(f"{factor} {level}" for factor, level in place)

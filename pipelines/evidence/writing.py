"""Write the page of answers, docs/evidence/answers.md, and the same numbers as JSON, from the results of all studies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit.analysis.study import AtBest
from pipelines.evidence.comparing import (
    best_rates,
    by_rates,
    compared,
    declared_comparisons,
    declared_effects,
    delays_over_training,
    of_baseline,
    other_effects,
)
from pipelines.evidence.failing import failures, first_to_rise, most_changed, spiked
from pipelines.evidence.figures import draw
from pipelines.evidence.judging import Answers, answer, questions
from pipelines.evidence.results import RESULTS, Made, Results
from pipelines.evidence.training import constant_rate, in_words
from pipelines.files import write_json
from pipelines.report.words import MINUS, counted, listed

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

- **optimiser**: β₂ is the decay of AdamW's average of squared gradients, "EMA" that of the averaged weights. "See factors":
  the study varies this. Precision and backend are what `auto` chooses on the device, unless the line names them.
- **commit**: what was checked out when the runs were trained. "With changes": some files differed from it. The digest `code` is
  that of the code that trained, and identifies it also if the history no longer has the commit.
- **a difference**: how much higher the error of a start is, in %, than that of the study's baseline (the published start,
  `adaln_zero`, unless the table names another). The start is "worse" or "better" if the corrected p-value is below 5 %. A
  comparison without a verdict still has a difference, over the seeds at which neither run failed, but nothing can be concluded
  from it.
- **best learning rate**: the minimum of a parabola through three measured rates, over all seeds. The seeds that choose a rate
  for a verdict are fewer, so their best rate may be another one.
- **an effect**: the change of the error in %, or of the share of its steps that a run survives, if one factor changes and all
  others are averaged. It is "clear" if the corrected p-value is below 5 %. *A combined with B* is an interaction: how much more
  the change A does if the change B is made, too. In the studies of stability, `5_percent` is a warm-up over 5 % of the steps.
- **late by**: how many more steps a start needs to reach an error of the baseline; if negative, how many fewer. For runs of
  different length, this is the error at which the baseline ends. For runs at a constant rate, these are the errors of the
  baseline's trained weights after the first eighth of the run, and the number is the mean over them. A word says how it changes
  over the run: it "grows" or "shrinks" (in size), "changes sign", or is "constant" (it changes by less than a quarter).
  "Undetermined": the seeds cannot tell. "Not distinguishable": it cannot be told from zero. Seeds at
  which a run failed are left out, and then the number of the other seeds is given.
- **error at the lowest rate**: the baseline's mean error over seeds, at the lowest rate at which a run finished, and how
  much its error at other rates differs from it, over the seeds at which no run failed.
- **runs that failed**: "3 + 1 of 5" means that of five runs, three collapsed or diverged, and one *never learned*: it finished,
  but with more than half of the error of a zero output. Without a plus sign, every run that failed collapsed or diverged.
- **runs that spiked and finished**: [stability.md](../stability.md) defines a spike. "1 of 7 (\u00d7 3.5)": of seven runs that
  finished, one had spiked. The highest final error of such runs was 3.5 times the mean of the others at this rate.
- **what left its range first**: before a failure, gradient norm, loss and error are known for every step. The range of a
  quantity ends at 2 times (gradient norm) or 1.5 times (loss, error) its median in the first half of the last 64 steps. The
  lead is how many steps before the turning point it left this range for good. The *turning point* is the last spike before the
  failure, or the failure if there was no spike. "None": nothing left its range, or too few steps were kept.
- **what had changed most before a failure**: the names are those of the measurements in `stability.csv`, which
  [stability.md](../stability.md) explains. The last column says how many steps before the turning point this diagnosis was.
- **starts of `attribution`**: `gates0` has zero gates, `gates1` open gates, `outputs0` open gates with zero residual outputs.
  `mod0` has zero shift and scale, `mod03` 0.3 RMS. `head0` has a zero head, `headx` a Xavier head. In `dead_blocks`, a control,
  the blocks never learn.
"""


def write(root: Path) -> list[str]:
    """Write the page, its figures and `answers.json`; returns the names of the studies that have results."""
    asked = questions(root)
    paths = {name: root / RESULTS / f"{name}.json" for name in asked}
    found = {name: Results.read(path) for name, path in paths.items() if path.exists()}
    answers = {name: answer(results, asked[name]) for name, results in found.items() if results.complete}
    (root / FIGURES).mkdir(exist_ok=True)
    for name, one in answers.items():
        draw(one, root / FIGURES / f"{name}.svg")
    sections = [_section(asked[name]["title"], results, answers.get(name)) for name, results in found.items()]
    (root / PAGE).write_text("\n".join([HEAD, *sections]))
    write_json(root / NUMBERS, {name: [_rounded(one) for one in _declared(each)] for name, each in answers.items()})
    return list(found)


def _section(title: str, results: Results, answers: Answers | None) -> str:
    """The section of one study. It has no answers if the study was cut."""
    name = results.study
    lines = [f"## `{name}`: {title}", "", _conditions(name, results), ""]
    if answers is None:
        cut = f"**Cut: {len(results.runs)} of {results.planned} runs have ended, so it has no answers yet.**"
        return HYPHEN.sub(MINUS, "\n".join([*lines, cut, ""]))
    for found in _of_declared(answers):
        lines += [*found, ""]
    if late := [f"- {sentence}" for sentence in _of_delays(answers)]:
        lines += [*late, ""]
    lines += [f"![{title}](figures/{name}.svg)", ""]
    for found in _tables(answers):
        lines += [*found, ""]
    return HYPHEN.sub(MINUS, "\n".join(lines))


def _conditions(name: str, results: Results) -> str:
    first, made = results.runs[0], results.made
    lengths = sorted({run.length for run in results.runs})
    steps = f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}"
    seeds = len({run.seed for run in results.runs})
    minutes = sum(one.minutes for one in made)
    failed = sum(run.status != "finished" for run in results.runs) or "none"
    networks = list(dict.fromkeys(run.network for run in results.runs))
    workers = " or ".join(dict.fromkeys(str(one.workers) for one in made))
    return (
        f"{listed(networks)} on {first.data}, {steps} steps, {counted(seeds, 'seed')}, {counted(len(results.runs), 'run')}; "
        f"{failed} collapsed or diverged. Training: {in_words(results.values)}. {minutes:.1f} minutes of one {made[0].device}, "
        f"torch {made[0].torch}, {workers} runs at a time. Latents `{made[0].data.get('data/latents', '')[:12]}`, "
        f"code `{made[0].code[:12]}`, {_commits(made)}. Command: `python -m pipelines.evidence run {name}`."
    )


def _commits(made: Sequence[Made]) -> str:
    names = dict.fromkeys(
        f"`{one.commit.removesuffix('+')}`{' with changes' if one.commit.endswith('+') else ''}" for one in made
    )
    return f"{'commit' if len(names) == 1 else 'commits'} {listed(list(names))}"


def _of_declared(answers: Answers) -> Iterator[list[str]]:
    """Tables of the declared answers, with the conditions that the section's first line does not state."""
    if answers.effects:
        yield declared_effects(answers.effects)
    if found := declared_comparisons(answers.findings):
        yield found


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
    for one in compared(answers.findings):
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


def _tables(answers: Answers) -> Iterator[list[str]]:
    """Every other table of a study, those without a row left out."""
    findings, runs = answers.findings, answers.results.runs
    if answers.effects and answers.effects.quantity == "survived":
        found = [other_effects(answers.effects), failures(runs), first_to_rise(runs), most_changed(runs)]
    elif answers.effects:
        found = [other_effects(answers.effects), by_rates(findings), failures(runs), spiked(runs)]
    else:
        found = [best_rates(findings), by_rates(findings), of_baseline(findings), failures(runs), spiked(runs)]
        if findings.tunings and constant_rate(answers.results.values):
            found.append(delays_over_training(findings))
    yield from filter(None, found)

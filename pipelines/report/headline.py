"""The answer in words, derived from the numbers of the study; it says so if the numbers do not suffice for an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dit.analysis.comparison import (
    ended,
)
from dit.analysis.study import AtBest, Findings, Pair, Question, find
from dit.analysis.verdicts import Judgement
from pipelines.report import answers, notes
from pipelines.report.notes import Finding, Kind
from pipelines.report.runs import Study
from pipelines.report.tuning import place_label
from pipelines.report.words import counted, listed

ZERO_HEAD, RANDOM_HEAD, CONTROL = "adaln_zero", "head_xavier", "symmetric"
"""Strategies that the question is about. If one is not in the study, sentences about it are left out."""

SHOWN = {
    "worse": "a lower validation error with the zero head",
    "better": "a lower validation error with the random head",
    "not distinguishable": "no difference that can be told from chance",
    "no verdict": "no verdict",
}
"""What a verdict on the random head means."""

SENTENCES = 4
"""How many verdicts the detail of an answer spells out; the table holds all."""


@dataclass(frozen=True)
class Headline:
    """The question, its answer, the conditions of the answer, the verdicts behind it, and other findings of the study."""

    question: str
    answer: str
    conditions: str
    detail: str
    findings: list[Finding]

    @property
    def lead(self) -> str:
        """The first sentence of the answer, or the first two if the first is very short, such as `Yes.`"""
        pieces = re.split(r"(?<=\.) (?=[A-Z])", self.answer)
        return " ".join(pieces[: 1 if len(pieces[0]) > len("It depends on the averaging.") else 2])

    @property
    def rest(self) -> str:
        """The answer after `lead`."""
        return self.answer[len(self.lead) :].strip()

    @property
    def sentences(self) -> list[str]:
        """Answer, conditions, detail and findings as plain text."""
        texts = (self.answer, self.conditions, self.detail, *(finding.text for finding in self.findings))
        return [text for text in texts if text]


def headline(study: Study, summary: dict[str, Any]) -> Headline:
    """The headline that follows from the numbers of the study."""
    about_heads = {ZERO_HEAD, RANDOM_HEAD} <= summary["strategies"].keys()
    question, answer, detail = _head_answer(study, summary) if about_heads else _general_answer(study)
    warnings = [
        _final_errors(study) if about_heads else None,
        notes.lost(study, summary),
        notes.not_tuned(study),
        notes.unsampled(summary),
        notes.samples_rank_nothing(summary),
        notes.few_seeds(summary),
        notes.averaging(summary),
        notes.devices(summary),
    ]
    found = [
        *_reversals(study),
        _interactions(study),
        _control(study, summary),
        _others(study, about_heads),
        *_delays(study, about_heads),
        notes.start(summary),
        notes.going(summary),
        notes.awake(summary),
        notes.samples(summary),
    ]
    return Headline(
        question, answer, _conditions(study, summary), detail, [finding for finding in (*warnings, *found) if finding]
    )


def _conditions(study: Study, summary: dict[str, Any]) -> str:
    """The conditions under which the findings hold, in one sentence."""
    runs = study.trained.values()
    networks, data, lengths, rates = (
        list(dict.fromkeys(values))
        for values in (
            (run.network for run in runs),
            (run.data for run in runs),
            (f"{run.length:,}" for run in runs),
            (f"{rate:g}" for rate in sorted({run.rate for run in runs})),
        )
    )
    factors = list(dict.fromkeys(factor for run in runs for factor, _ in run.place))
    across = f", across {listed(factors)}" if factors else ""
    few = networks if len(networks) <= 3 else [f"{len(networks)} networks"]
    plural = "" if len(rates) == 1 else "s"
    return (
        "Measured as validation error (final differences with the EMA weights, delays with the trained weights), with "
        f"{listed(few)} on {listed(data)}{notes.pictures(summary)}, "
        f"after {listed(lengths)} steps, at learning rate{plural} {listed(rates)}{across}, over "
        f"{counted(len(study.seeds), 'seed')}."
    )


def _heads(study: Study) -> Findings:
    """The findings for the random head against the zero head, whatever the study's baseline is."""
    if study.baseline == ZERO_HEAD:
        return study.findings
    runs = (run for run in study.trained.values() if run.strategy in (ZERO_HEAD, RANDOM_HEAD))
    return find(runs, Question(ZERO_HEAD, (ZERO_HEAD, RANDOM_HEAD), (), study.params.study.choose_on))


def _head_answer(study: Study, summary: dict[str, Any]) -> tuple[str, str, str]:
    """Question, answer and detail of: does the zero head learn as well as the random head?"""
    question = "Does a diffusion transformer with a zero output projection learn as well as one with a random projection?"
    findings = _heads(study)
    pairs = findings.of(RANDOM_HEAD)
    tuned = [one for one in findings.at_best if one.strategy == RANDOM_HEAD]
    delay = answers.delay(pairs, "The random head", "the zero head")
    if len(pairs) == 1 and not tuned:
        answer = _one_setting(study, summary, pairs[0].judgement)
        return question, " ".join(filter(None, (answer, delay))), _verdicts(pairs, [])
    return (
        question,
        _many_settings(pairs, tuned, delay),
        _verdicts(pairs, [one.judgement for one in tuned]),
    )


def _final_errors(study: Study) -> Finding | None:
    """By how much the heads' final errors differ, where the answer says how training goes, or only which head is better."""
    findings = _heads(study)
    pairs = findings.of(RANDOM_HEAD)
    told = any(one.strategy == RANDOM_HEAD for one in findings.at_best) or not answers.delay(pairs, RANDOM_HEAD, ZERO_HEAD)
    if told or RANDOM_HEAD in answers.reversed_strategies(study.findings):
        return None
    return Finding("note", f"In final validation error against {ZERO_HEAD}, {RANDOM_HEAD} {answers.standing(pairs)}.")


def _one_setting(study: Study, summary: dict[str, Any], found: Judgement) -> str:
    answer = {
        "worse": "Yes. The zero head ends training with a lower validation error than the random head.",
        "better": "No. The zero head ends training with a higher validation error than the random head.",
        "not distinguishable": f"Not distinguishable. Over {found.n} seeds, the zero head and the random head end training "
        "with validation errors that cannot be told apart.",
        "no verdict": _undecided(study, found),
    }[found.answer]
    if study.baseline == ZERO_HEAD and summary["compared_steps"] and found.answer != "no verdict":
        trained = summary["strategies"][RANDOM_HEAD]["difference"][notes.final_metric(summary)]["verdict"]
        if trained != found.answer:
            shown = f"The EMA weights show {SHOWN[found.answer]}, the trained weights {SHOWN[trained]}."
            return f"It depends on the averaging. {shown}"
    return answer


def _undecided(study: Study, found: Judgement) -> str:
    """The answer if there is no verdict; if all runs with one of the heads fail, that is an answer too."""
    asked = found.comparison
    zero, random = (sum(map(ended, side.values())) for side in (asked.baseline_values, asked.values))
    if bool(zero) != bool(random):
        lost, head, kept, answer = (RANDOM_HEAD, "random", "zero", "Yes") if zero else (ZERO_HEAD, "zero", "random", "No")
        ways = " or ".join(sorted({run.train.status for run in study.runs[lost].values()}, reverse=True))
        return f"{answer}. With the {head} head every run {ways}; with the {kept} head runs finished."
    if not found.n:
        return "Undecided. There is no seed at which both the zero head and the random head finished training."
    if len(asked.values) == 1:
        return "Undecided. One seed gives no interval, so chance cannot be told from effect."
    return f"Undecided. There is no verdict, because {found.reason}."


def _many_settings(pairs: list[Pair], tuned: list[AtBest], delay: str | None) -> str:
    """The answer over several rates or settings: yes or no only where all of them agree."""
    found = {one.judgement.answer for one in tuned or pairs}
    start = {frozenset({"worse"}): "Yes.", frozenset({"better"}): "No."}.get(frozenset(found), "")
    if found == {"no verdict"} and not delay:
        start = "Undecided."
    if {"worse", "better"} <= found:
        start = "It depends on the setting."
    if tuned:
        level = f"Each at its own best learning rate, the random head {_at_best(tuned)}."
    else:
        level = "" if delay else f"The random head {answers.standing(pairs)}."
    return " ".join(filter(None, (start, delay, level)))


def _at_best(tuned: list[AtBest]) -> str:
    """`is worse than the zero head (+2.2 %, ...)`, for each place."""
    clauses = []
    for one in tuned:
        where = f" with {place_label(one.place)}" if one.place else ""
        if one.judgement.answer == "no verdict":
            clauses.append(f"has no verdict{where}, as {answers.short_reason(one.judgement)}")
        else:
            word = "from" if one.judgement.answer == "not distinguishable" else "than"
            clauses.append(f"is {one.judgement.answer} {word} the zero head{where} ({answers.sizes([one.judgement])})")
    return ", ".join(clauses)


def _verdicts(pairs: list[Pair], tuned: list[Judgement]) -> str:
    """The verdicts with their conditions; if there are many, those at the same rate are only summarised."""
    judged = [*tuned, *(pair.judgement for pair in pairs)]
    if len(judged) <= SENTENCES:
        return " ".join(one.sentence for one in judged)
    rest = f"In final validation error at the same learning rate, {RANDOM_HEAD} {answers.standing(pairs)}."
    return " ".join([*(one.sentence for one in tuned[:SENTENCES]), rest])


def _general_answer(study: Study) -> tuple[str, str, str]:
    """Question, answer and detail of: what does each strategy change compared with the baseline?"""
    baseline, findings = study.baseline, study.findings
    question = f"What does the initialisation change, compared with {baseline}?"
    if not study.others:
        return question, f"The study holds one strategy, {baseline}, so there is nothing to compare it with.", ""
    found = {name: {pair.judgement.answer for pair in findings.of(name)} for name in study.others}
    decided = {name: next(iter(verdicts)) for name, verdicts in found.items() if len(verdicts) == 1}
    clear = [
        f"{_are([name for name in decided if decided[name] == verdict])} {verdict}"
        for verdict in ("better", "worse")
        if verdict in decided.values()
    ]
    everywhere = " at every setting" if len({(pair.place, pair.rate) for pair in findings.pairs}) > 1 else ""
    judged = {verdict for verdicts in found.values() for verdict in verdicts} - {"no verdict"}
    if clear:
        answer = f"In final validation error, {listed(clear)} than {baseline}{everywhere}."
    elif judged & {"better", "worse"}:
        answer = f"It depends on the setting whether a strategy ends better or worse than {baseline}."
    elif judged:
        answer = f"Not distinguishable. No strategy's final validation error can be told apart from that of {baseline}."
    else:
        answer = "Undecided. No comparison has a verdict."
    details = [answers.against(findings, name) for name in study.others]
    tuned = answers.at_best(findings.at_best) or ""
    return question, answer, f"{tuned} Validation error against {baseline}: {'; '.join(details)}.".strip()


def _reversals(study: Study) -> list[Finding]:
    """Strategies whose verdict is reversed between settings."""
    names = answers.reversed_strategies(study.findings)
    return [
        Finding("note", f"What {name} does depends on the setting: it {answers.standing(study.findings.of(name))}.")
        for name in names
    ]


def _interactions(study: Study) -> Finding | None:
    text = answers.interactions(study.findings)
    return Finding("note", text) if text else None


def _control(study: Study, summary: dict[str, Any]) -> Finding | None:
    """Whether the study sees the known failure of the control. If not, its other null results mean little."""
    pairs = study.findings.of(CONTROL)
    if CONTROL not in study.runs or study.baseline == CONTROL or not pairs:
        return None
    told = answers.against(study.findings, CONTROL)
    tuned = answers.at_best([one for one in study.findings.at_best if one.strategy == CONTROL])
    tuned = " ".join(["", *filter(None, (tuned, notes.missed_by_samples(summary, CONTROL)))])
    worse = [pair for pair in pairs if pair.judgement.answer == "worse"]
    judged = [pair for pair in pairs if pair.judgement.answer != "no verdict"]
    if worse and len(worse) == len(judged):
        return Finding(
            "better",
            f"The study detects its control, a start that is broken on purpose, in validation error: {told}.{tuned}",
        )
    if worse:
        return Finding("note", f"The study detects its broken control only {answers.scope(worse, pairs)}: {told}.{tuned}")
    if not judged:
        return Finding("warning", f"There is no verdict on the control, a start that is broken on purpose: {told}.{tuned}")
    return Finding(
        "warning",
        f"The study does not detect its control, a start that is broken on purpose: {told}. So it is too small or too short "
        f"for a null result to mean anything.{tuned}",
    )


def _others(study: Study, about_heads: bool) -> Finding | None:
    """Every strategy that answer and control do not mention."""
    if not about_heads:
        return None
    spoken = {study.baseline, CONTROL}
    if study.baseline in (ZERO_HEAD, RANDOM_HEAD):
        spoken |= {ZERO_HEAD, RANDOM_HEAD}
    spoken |= set(answers.reversed_strategies(study.findings))
    others = [name for name in study.runs if name not in spoken]
    if not others:
        return None
    verdicts = {pair.judgement.answer for name in others for pair in study.findings.of(name)}
    kind: Kind = "same" if verdicts == {"not distinguishable"} else "note"
    text = "; ".join(answers.against(study.findings, name) for name in others)
    tuned = answers.at_best([one for one in study.findings.at_best if one.strategy in others])
    return Finding(kind, " ".join(filter(None, (f"In validation error against {study.baseline}: {text}.", tuned))))


def _delays(study: Study, about_heads: bool) -> list[Finding]:
    """Delay or level of every strategy that the answer does not mention."""
    spoken = {RANDOM_HEAD} if about_heads and study.baseline == ZERO_HEAD else set()
    found = (
        (name, answers.delay(study.findings.of(name), name, study.baseline)) for name in study.others if name not in spoken
    )
    return [Finding("note", text) for _, text in found if text]


def _are(names: list[str]) -> str:
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"

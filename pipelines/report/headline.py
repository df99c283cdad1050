"""The answer in words, derived from the numbers of the summary: it changes with them, and says so where they do not suffice."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from dit.analysis.comparison import (
    CONFIDENCE,
    INITIAL,
    METRICS,
    Difference,
    error_at,
    interval_reach,
    lags,
    starts_at_zero_output,
    steps_to,
)
from pipelines.report.summary import difference
from pipelines.report.words import counted, decimals_for, fixed, listed, percent

ZERO_HEAD, RANDOM_HEAD, CONTROL = "adaln_zero", "head_xavier", "symmetric"
"""Strategies with a part in the question. Where one is not in the study, what is said about it is left out."""

ERROR = "validation_mse"
SHOWN = {
    "worse": "a lower validation error with the zero head",
    "better": "a lower validation error with the random head",
    "not distinguishable": "no difference that can be told from chance",
}
"""What a verdict on the random head means."""

Kind = Literal["better", "worse", "same", "note", "warning"]


@dataclass(frozen=True)
class Finding:
    """A sentence or two, and what kind of news they are."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Headline:
    """The question, its answer in one sentence, the numbers behind it, and what else the study found."""

    question: str
    answer: str
    detail: str
    findings: list[Finding]

    @property
    def sentences(self) -> list[str]:
        """All of it as plain text."""
        return [text for text in (self.answer, self.detail, *(finding.text for finding in self.findings)) if text]


def headline(summary: dict[str, Any]) -> Headline:
    """Say what the numbers of `summary` allow to say."""
    question, answer, detail = _head_answer(summary) if _about_heads(summary) else _general_answer(summary)
    found = [_control(summary), _others(summary), _start(summary), _going(summary), _awake(summary), _samples(summary)]
    warnings = [_lost(summary), _unsampled(summary), _few_seeds(summary), _averaging(summary), _devices(summary)]
    return Headline(question, answer, detail, [finding for finding in (*warnings, *found) if finding])


def _about_heads(summary: dict[str, Any]) -> bool:
    return {ZERO_HEAD, RANDOM_HEAD} <= summary["strategies"].keys()


def _head_answer(summary: dict[str, Any]) -> tuple[str, str, str]:
    """Does the zero head learn as well as the random one?"""
    found = difference(summary, RANDOM_HEAD, ZERO_HEAD, ERROR)
    answer = {
        "worse": "Yes. The zero head ends training with a lower validation error than the random head.",
        "better": "No. The zero head ends training with a higher validation error than the random head.",
        "not distinguishable": f"Not distinguishable. Over {found.n} seeds, the zero head and the random head end training "
        "with validation errors that cannot be told apart.",
        "one seed": "Undecided. One seed gives no interval, so chance cannot be told from effect.",
        "no pair": _finished_heads(summary),
    }[found.verdict]
    trained = difference(summary, RANDOM_HEAD, ZERO_HEAD, _final(summary)).verdict if found.n else found.verdict
    if trained != found.verdict:
        answer = (
            f"It depends on the averaging. The EMA weights show {SHOWN[found.verdict]}, the trained weights {SHOWN[trained]}."
        )
    question = "Does a diffusion transformer with a zero output projection learn as well as one with a random projection?"
    return question, answer, _head_detail(summary, found)


def _finished_heads(summary: dict[str, Any]) -> str:
    """The answer where no seed finished with both heads."""
    zero, random = (summary["strategies"][name]["n"] for name in (ZERO_HEAD, RANDOM_HEAD))
    if bool(zero) == bool(random):
        return "Undecided. There is no seed at which both the zero head and the random head finished training."
    lost, kept, answer = (RANDOM_HEAD, "zero", "Yes") if zero else (ZERO_HEAD, "random", "No")
    head = "random" if zero else "zero"
    return (
        f"{answer}. With the {head} head every run {_ways_lost(summary, lost)}; with the {kept} head training came to its end."
    )


def _head_detail(summary: dict[str, Any], found: Difference) -> str:
    if not found.n:
        return ""
    base = _paired_mean(summary, ZERO_HEAD, RANDOM_HEAD)
    decimals = decimals_for([base])
    other = _paired_mean(summary, RANDOM_HEAD, ZERO_HEAD)
    detail = (
        f"Validation error of the EMA weights after {summary['study']['steps']} steps: {fixed(base, decimals)} with "
        f"{ZERO_HEAD}, {fixed(other, decimals)} with {RANDOM_HEAD}. Paired by seed, the random head's error differs by "
        f"{_relative(found, base)} (n = {counted(found.n, 'seed')})."
    )
    if found.verdict == "not distinguishable" and found.low is not None and found.high is not None:
        detail += (
            f" Anything from a random head that is {percent(-found.low / base, signed=False)} better to "
            f"{percent(found.high / base, signed=False)} worse agrees with these runs."
        )
    unaveraged = difference(summary, RANDOM_HEAD, ZERO_HEAD, _final(summary))
    base = _paired_mean(summary, ZERO_HEAD, RANDOM_HEAD, _final(summary))
    return f"{detail} Without averaging: {_relative(unaveraged, base)}."


def _general_answer(summary: dict[str, Any]) -> tuple[str, str, str]:
    """What does each strategy change against the baseline?"""
    baseline = summary["baseline"]
    question = f"What does the initialisation change, compared with {baseline}?"
    verdicts = _verdicts(summary)
    if not verdicts:
        return question, f"The study holds one strategy, {baseline}, so there is nothing to compare it with.", ""
    clear = [f"{_are(verdicts[verdict])} {verdict}" for verdict in ("better", "worse") if verdict in verdicts]
    if clear:
        answer = f"In final validation error, {listed(clear)} than {baseline}."
    elif "not distinguishable" in verdicts:
        answer = f"Not distinguishable. No strategy's final validation error can be told apart from that of {baseline}."
    else:
        answer = "Undecided. A comparison needs two seeds at which a strategy and the baseline both finished."
    details = [_against(summary, name) for name in summary["strategies"] if name != baseline]
    return question, answer, f"Validation error against {baseline}: {'; '.join(details)}."


def _control(summary: dict[str, Any]) -> Finding | None:
    """Is the known failure seen? If not, no other silence of the study means much."""
    if CONTROL not in summary["strategies"] or summary["baseline"] == CONTROL:
        return None
    found = _to_baseline(summary, CONTROL, ERROR)
    if found.verdict == "worse":
        return Finding(
            "better",
            f"The control is caught: {_against(summary, CONTROL)} in validation error. "
            f"A true symmetry failure shows at this size.",
        )
    if found.verdict in ("one seed", "no pair"):
        return Finding("warning", f"The control was not put to the test: {_against(summary, CONTROL)}.")
    return Finding(
        "warning",
        f"The control is not caught: {_against(summary, CONTROL)} in validation error. A failure made on purpose does not "
        f"show, so this study is too small or too short for a null result to mean anything.",
    )


def _others(summary: dict[str, Any]) -> Finding | None:
    """Every strategy that the answer and the control did not speak of."""
    if not _about_heads(summary):
        return None
    spoken = {summary["baseline"], CONTROL}
    if summary["baseline"] in (ZERO_HEAD, RANDOM_HEAD):
        spoken |= {ZERO_HEAD, RANDOM_HEAD}
    others = [name for name in summary["strategies"] if name not in spoken]
    if not others:
        return None
    verdicts = {_to_baseline(summary, name, ERROR).verdict for name in others}
    kind: Kind = "same" if verdicts == {"not distinguishable"} else "note"
    text = "; ".join(_against(summary, name) for name in others)
    return Finding(kind, f"The other strategies in validation error, against {summary['baseline']}: {text}.")


def _start(summary: dict[str, Any]) -> Finding | None:
    """Where each strategy starts, against the error of a network whose output is zero."""
    moment = summary["study"]["target_second_moment"]
    starts = {name: entry["mean"][INITIAL.name] for name, entry in summary["strategies"].items()}
    at = [name for name, start in starts.items() if start is not None and starts_at_zero_output(start, moment)]
    away = [f"{name} starts at {start:.2f}" for name, start in starts.items() if start is not None and name not in at]
    zero = f"{moment:.2f}, the mean square of the {summary['study']['objective']} target"
    sentences = []
    if at:
        sentences.append(f"{listed(at)} {'starts' if len(at) == 1 else 'start'} at the error of a zero output ({zero}).")
    if away:
        sentences.append(f"{listed(away)}" + ("." if at else f", where a zero output has {zero}."))
    return Finding("note", " ".join(sentences)) if sentences else None


def _going(summary: dict[str, Any]) -> Finding | None:
    """How fast each strategy gets going: the step at which it reaches an early error of the baseline."""
    if not summary["thresholds"]:
        return None
    step, limit = next(iter(summary["thresholds"].items()))
    reached = {name: entry["mean"][steps_to(int(step))] for name, entry in summary["strategies"].items()}
    later = [f"{name} at step {at:.0f}" for name, at in reached.items() if at is not None and name != summary["baseline"]]
    if not later:
        return None
    decimals = decimals_for([limit], digits=3)
    text = f"The error of {summary['baseline']} at step {step} ({fixed(limit, decimals)}) is reached by {listed(later)}."
    never = [name for name, at in reached.items() if at is None and summary["strategies"][name]["n"]]
    return Finding("note", text + (f" {listed(never)} never reached it." if never else ""))


def _awake(summary: dict[str, Any]) -> Finding:
    """From which step on every role of the network learns."""
    steps: dict[int, list[str]] = defaultdict(list)
    never = []
    for name, entry in summary["strategies"].items():
        step = entry["start"]["awake_step"]
        never.append(name) if step is None else steps[step].append(name)
    parts = [f"from step {step} on in {listed(names)}" for step, names in sorted(steps.items())]
    sentences = [f"Every part of the network receives a gradient {listed(parts)}."] if parts else []
    sentences += [f"In {listed(never)} some part of it receives none in the steps looked at."] if never else []
    agrees = {name: entry["start"]["predicted_equals_measured"] for name, entry in summary["strategies"].items()}
    if wrong := [name for name, agreed in agrees.items() if agreed is False]:
        return Finding("warning", " ".join([*sentences, f"That is not what the architecture predicts for {listed(wrong)}."]))
    if None in agrees.values():
        return Finding("note", " ".join([*sentences, "This is measured, not predicted; the wake-up figure says why."]))
    return Finding("note", " ".join([*sentences, "The architecture alone predicts the same."]))


def _samples(summary: dict[str, Any]) -> Finding | None:
    """What the sample metrics can tell apart."""
    metrics = [metric for metric in METRICS if metric.name != ERROR]
    clear, tested = [], 0
    for name in summary["strategies"]:
        if name == summary["baseline"]:
            continue
        for metric in metrics:
            verdict = _to_baseline(summary, name, metric.name).verdict
            tested += verdict in ("better", "worse", "not distinguishable")
            if verdict in ("better", "worse"):
                clear.append(f"{name} {verdict} in {metric.label}")
    if not tested:
        return None
    text = f"Of {tested} comparisons of generated samples with {summary['baseline']}, "
    if not clear:
        return Finding("same", f"{text}none is distinguishable at {counted(len(summary['study']['seeds']), 'seed')}.")
    return Finding("note", f"{text}{len(clear)} can be told apart: {'; '.join(clear)}.")


def _lost(summary: dict[str, Any]) -> Finding | None:
    """Runs that diverged or collapsed: they belong to no mean."""
    lost: dict[str, list[str]] = {"diverged": [], "collapsed": []}
    for name, entry in summary["strategies"].items():
        for seed, run in entry["runs"].items():
            if collapsed := run["collapsed"]:
                lost["collapsed"].append(f"{name}-{seed} at step {collapsed['step']} (error {collapsed['mse']:.2f})")
            elif diverged := run["diverged"]:
                how = f"{diverged['quantity']} {diverged['value']}"
                lost["diverged"].append(f"{name}-{seed} at step {diverged['step']} ({how})")
    sentences = [f"{counted(len(runs), 'run')} {how}: {listed(runs)}." for how, runs in lost.items() if runs]
    if not sentences:
        return None
    return Finding("warning", " ".join([*sentences, "Means and differences are over the runs that finished."]))


def _ways_lost(summary: dict[str, Any], name: str) -> str:
    """`diverged or collapsed`, as the runs of a strategy did of which none finished."""
    return " or ".join(sorted({run["status"] for run in summary["strategies"][name]["runs"].values()}, reverse=True))


def _unsampled(summary: dict[str, Any]) -> Finding | None:
    """Runs that finished training and whose samples were not finite all the same."""
    runs = [
        f"{name}-{seed}"
        for name, entry in summary["strategies"].items()
        for seed, run in entry["runs"].items()
        if run["status"] == "finished" and run["sampling"] == "diverged"
    ]
    return (
        Finding("warning", f"Sampling met values that are not finite in {listed(runs)}: no sample metrics.") if runs else None
    )


def _few_seeds(summary: dict[str, Any]) -> Finding | None:
    seeds = len(summary["study"]["seeds"])
    if seeds > 2 or len(summary["strategies"]) == 1:
        return None
    if seeds == 1:
        return Finding("warning", "One seed: differences are shown without intervals, and none of them is called an effect.")
    return Finding(
        "warning",
        f"Two seeds leave one degree of freedom: an interval reaches {interval_reach(2):.1f} standard errors to each side.",
    )


def _averaging(summary: dict[str, Any]) -> Finding | None:
    """Whether the averaged weights, by which runs are judged, lag behind the trained ones or lead to another verdict."""
    if not summary["compared_steps"]:
        return None
    final = _final(summary)
    lagging, disputed = [], []
    for name, entry in summary["strategies"].items():
        averaged, trained = entry["mean"][ERROR], entry["mean"][final]
        if trained is not None and lags(averaged, trained):
            lagging.append(f"{name} {percent(averaged / trained - 1)}")
        if name != summary["baseline"]:
            verdicts = [_to_baseline(summary, name, metric).verdict for metric in (ERROR, final)]
            if verdicts[0] != verdicts[1]:
                disputed.append(f"{name} is {verdicts[0]} by the averaged weights, {verdicts[1]} by the trained ones")
    sentences = []
    if lagging:
        sentences.append(
            f"The EMA lags: averaged weights have a higher error than the trained ones ({', '.join(lagging)}), "
            f"so they still hold something of the start; train longer or lower train.ema_decay."
        )
    if disputed:
        sentences.append(f"The two disagree after {summary['study']['steps']} steps: {'; '.join(disputed)}.")
    return Finding("warning", " ".join(sentences)) if sentences else None


def _devices(summary: dict[str, Any]) -> Finding | None:
    devices = summary["study"]["devices"]
    if len(devices) == 1:
        return None
    return Finding("warning", f"The runs used different devices ({listed(devices)}), which alone makes them differ.")


def _verdicts(summary: dict[str, Any]) -> dict[str, list[str]]:
    """Strategies by their verdict in validation error."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in summary["strategies"]:
        if name != summary["baseline"]:
            found[_to_baseline(summary, name, ERROR).verdict].append(name)
    return found


def _against(summary: dict[str, Any], name: str) -> str:
    """`symmetric is worse (+6.4 %, 95 % interval +5.1 % to +7.7 %)`."""
    found = _to_baseline(summary, name, ERROR)
    if not summary["strategies"][name]["n"]:
        return f"{name} {_ways_lost(summary, name)} at every seed"
    if found.mean is None:
        return f"{name} has no seed at which both finished"
    base = _paired_mean(summary, summary["baseline"], name)
    verdict = "has one seed and no interval" if found.verdict == "one seed" else f"is {found.verdict}"
    return f"{name} {verdict} ({_relative(found, base)})"


def _are(names: list[str]) -> str:
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"


def _relative(found: Difference, base: float) -> str:
    """`+6.4 %, 95 % interval +5.1 % to +7.7 %`: a difference as a fraction of `base`."""
    shown = [bound / base for bound in (found.mean, found.low, found.high) if bound is not None]
    decimals = 2 if max(map(abs, shown)) < 0.01 else 1
    mean, *bounds = (percent(value, decimals) for value in shown)
    return f"{mean}, {percent(CONFIDENCE, 0, signed=False)} interval {bounds[0]} to {bounds[1]}" if bounds else mean


def _paired_mean(summary: dict[str, Any], name: str, other: str, metric: str = ERROR) -> float:
    """Mean error of `name` over the seeds at which `other` finished too."""
    runs, others = summary["strategies"][name]["runs"], summary["strategies"][other]["runs"]
    values = [run[metric] for seed, run in runs.items() if run[metric] is not None and others[seed][metric] is not None]
    return math.fsum(values) / len(values)


def _final(summary: dict[str, Any]) -> str:
    """The metric that is the validation error of the trained weights after training."""
    return error_at(summary["compared_steps"][-1]).name


def _to_baseline(summary: dict[str, Any], name: str, metric: str) -> Difference:
    return Difference(**summary["strategies"][name]["difference"][metric])

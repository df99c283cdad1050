"""Other findings of a study, in one or two sentences each: starts, wake-up, samples, failed runs, and cautions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from dit.analysis.comparison import INITIAL, error_at, interval_reach, lags, starts_at_zero_output
from dit.analysis.study import ERROR
from pipelines.report import answers
from pipelines.report.runs import Study
from pipelines.report.words import counted, decimals_for, fixed, listed, percent

Kind = Literal["better", "worse", "same", "note", "warning"]


@dataclass(frozen=True)
class Finding:
    """One or two sentences, and the kind of finding that they state."""

    kind: Kind
    text: str


def start(summary: dict[str, Any]) -> Finding | None:
    """The initial error of each strategy, compared with the error of a network whose output is zero."""
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


def going(summary: dict[str, Any]) -> Finding | None:
    """How fast each strategy starts to learn: the step at which it reaches an early error of the baseline."""
    if not summary["thresholds"]:
        return None
    step, limit = next(iter(summary["thresholds"].items()))
    reached = {name: entry["steps_to"][step]["median"] for name, entry in summary["strategies"].items()}
    later = [f"{name} at step {at:.0f}" for name, at in reached.items() if at is not None and name != summary["baseline"]]
    if not later:
        return None
    decimals = decimals_for([limit], digits=3)
    setting = f"At {summary['study']['setting']}, the" if summary["study"]["setting"] else "The"
    reached_error = f"error that {summary['baseline']} has at step {step} ({fixed(limit, decimals)})"
    text = f"{setting} {reached_error} is reached by {listed(later)}."
    never = [name for name, at in reached.items() if at is None and summary["strategies"][name]["n"]]
    return Finding("note", text + (f" Half of the runs of {listed(never)} never reached it." if never else ""))


def awake(summary: dict[str, Any]) -> Finding:
    """The step from which every role of the network learns."""
    steps: dict[int, list[str]] = defaultdict(list)
    never = []
    for name, entry in summary["strategies"].items():
        step = entry["start"]["awake_step"]
        never.append(name) if step is None else steps[step].append(name)
    parts = [f"from step {step} on in {listed(names)}" for step, names in sorted(steps.items())]
    sentences = [f"Every part of the network receives a gradient {listed(parts)}."] if parts else []
    sentences += [f"In {listed(never)}, some part receives none in the first steps that were examined."] if never else []
    agrees = {name: entry["start"]["predicted_equals_measured"] for name, entry in summary["strategies"].items()}
    if wrong := [name for name, agreed in agrees.items() if agreed is False]:
        differs = f"For {listed(wrong)}, this differs from the steps predicted from the architecture."
        return Finding("warning", " ".join([*sentences, differs]))
    if None in agrees.values():
        return Finding("note", " ".join([*sentences, "This is measured, not predicted; the wake-up figure says why."]))
    return Finding("note", " ".join([*sentences, "The prediction from the architecture alone is the same."]))


def samples_rank_nothing(summary: dict[str, Any]) -> Finding | None:
    """A warning that no metric of generated samples can rank the strategies; None if one can."""
    rankings = summary["rankings"]
    if not rankings or any(entry["possible"] for entry in rankings.values()):
        return None
    return Finding(
        "warning",
        "The generated samples cannot rank anything: none of their metrics tells these strategies apart, so none has a verdict "
        "(section Samples says why). This study says nothing about how good the pictures are.",
    )


def missed_by_samples(summary: dict[str, Any], name: str) -> str | None:
    """Which metrics of samples do not tell a strategy from the baseline; None if all do, or if nothing was sampled."""
    found = {metric: summary["strategies"][name]["difference"][metric]["verdict"] for metric in summary["rankings"]}
    missed = [summary["metrics"][metric]["label"] for metric, verdict in found.items() if verdict not in ("better", "worse")]
    if not missed:
        return None
    if len(missed) < len(found):
        return f"Of the sample metrics, {listed(missed)} {'does' if len(missed) == 1 else 'do'} not show it."
    metrics = counted(len(found), "sample metric")
    return f"The generated samples do not show it: none of the {metrics} tells {name} from the baseline."


def pictures(summary: dict[str, Any]) -> str:
    """`(960 training images of 16 classes)`; empty if the numbers are not known."""
    images = summary.get("images")
    if not images:
        return ""
    return f" ({images['counts']['train']:,} training images of {counted(images['classes'], 'class')})"


def samples(summary: dict[str, Any]) -> Finding | None:
    """The verdicts in those metrics of samples that can rank strategies, and the metrics that cannot; None if none can."""
    able = [name for name, entry in summary["rankings"].items() if entry["possible"]]
    unable = [summary["metrics"][name]["label"] for name, entry in summary["rankings"].items() if not entry["possible"]]
    if not able:
        return None
    clear = [
        f"{name} {found['verdict']} in {summary['metrics'][metric]['label']} (n = {found['n']}; exploratory)"
        for name, entry in summary["strategies"].items()
        for metric in able
        if (found := entry.get("difference", {}).get(metric, {})).get("verdict") in ("better", "worse")
    ]
    setting = f" at {summary['study']['setting']}" if summary["study"]["setting"] else ""
    text = (
        f"Generated samples{setting} against {summary['baseline']}: {'; '.join(clear) if clear else 'none is distinguishable'}."
    )
    return Finding(
        "note" if clear else "same", text + (f" No verdict in {listed(unable)}; section Samples says why." if unable else "")
    )


def lost(study: Study, summary: dict[str, Any]) -> Finding | None:
    """Runs that diverged or collapsed, which no mean includes."""
    if len(study.everything) > len(study.all_runs):
        text = answers.failing(study)
        return Finding("warning", text) if text else None
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
    return Finding("warning", " ".join([*sentences, "Means and differences use only the runs that finished."]))


def not_tuned(study: Study) -> Finding | None:
    """Why there is no verdict on strategies each at its own best rate."""
    text = answers.not_tuned(study)
    return Finding("note", text) if text else None


def unsampled(summary: dict[str, Any]) -> Finding | None:
    """Runs that finished training, but whose samples were not finite."""
    runs = [
        f"{name}-{seed}"
        for name, entry in summary["strategies"].items()
        for seed, run in entry["runs"].items()
        if run["status"] == "finished" and run["sampling"] == "diverged"
    ]
    return (
        Finding("warning", f"Sampling met values that are not finite in {listed(runs)}, so these have no sample metrics.")
        if runs
        else None
    )


def few_seeds(summary: dict[str, Any]) -> Finding | None:
    """A warning about conclusions that one or two seeds do not allow."""
    seeds = len(summary["study"]["seeds"])
    if seeds > 2 or len(summary["strategies"]) == 1:
        return None
    if seeds == 1:
        return Finding("warning", "One seed: differences are shown without intervals, and none of them is called an effect.")
    return Finding(
        "warning",
        f"Two seeds are too few for a verdict, which needs three: a 95 % interval from two reaches {interval_reach(2):.1f} "
        "standard errors to each side.",
    )


def averaging(summary: dict[str, Any]) -> Finding | None:
    """Whether the averaged weights, by which runs are judged, lag behind the trained ones or lead to another verdict."""
    if not summary["compared_steps"]:
        return None
    final = final_metric(summary)
    lagging, disputed = [], []
    for name, entry in summary["strategies"].items():
        averaged, trained = entry["mean"][ERROR.name], entry["mean"][final]
        if trained is not None and lags(averaged, trained):
            lagging.append(f"{name} {percent(averaged / trained - 1)}")
        if name != summary["baseline"]:
            verdicts = [entry["difference"][metric]["verdict"] for metric in (ERROR.name, final)]
            if verdicts[0] != verdicts[1] and "no verdict" not in verdicts:
                disputed.append(f"{name} is {verdicts[0]} with the averaged weights, {verdicts[1]} with the trained ones")
    sentences = []
    if lagging:
        sentences.append(
            f"The EMA lags: the averaged weights have a higher error than the trained ones ({', '.join(lagging)}), because "
            f"early weights still count in the average. Train longer or lower train.ema_decay."
        )
    if disputed:
        sentences.append(
            f"Averaged and trained weights disagree after {summary['study']['steps']} steps: {'; '.join(disputed)}."
        )
    return Finding("warning", " ".join(sentences)) if sentences else None


def devices(summary: dict[str, Any]) -> Finding | None:
    """Whether runs used different devices."""
    used = summary["study"]["devices"]
    if len(used) == 1:
        return None
    return Finding("warning", f"The runs used different devices ({listed(used)}), which alone makes results differ.")


def final_metric(summary: dict[str, Any]) -> str:
    """The name of the metric for the validation error of the trained weights after training."""
    return error_at(summary["compared_steps"][-1]).name

"""Compare runs of several strategies with the statistics of a study: paired over seeds, with intervals and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from dit.analysis.comparison import ended
from dit.analysis.study import Findings, Question, Trained, find
from dit.api.running import Run
from dit.errors import ConfigError

DATA = "the given latents"


@dataclass(frozen=True)
class Comparison:
    """The answer of `dit.compare`. `str` of it gives a sentence for each comparison, and `table` a row for each strategy.

    In the table, `mean_difference` is the difference to the baseline in final validation error of the averaged weights; `low`
    and `high` are its 95 % interval. All three are fractions of the baseline's mean error. `p` is corrected. `findings` holds
    everything that a study would find in these runs, such as delays.
    """

    findings: Findings
    table: pd.DataFrame

    def __str__(self) -> str:
        return "\n".join(pair.judgement.sentence for pair in self.findings.pairs)


def compare(runs: Mapping[str, Sequence[Run]], baseline: str | None = None) -> Comparison:
    """Compare runs of several strategies with those of a baseline, paired by seed.

    `runs` maps a name to the runs of one strategy. `baseline` is one of these names; by default it is the first. All
    comparisons count as declared before the runs, so verdicts are corrected for their number by Holm's method. A verdict needs
    three seeds. Raises `ConfigError` if there are fewer than two names, if a name has no run or two runs of one seed, or if
    runs differ in length, network, objective or latents.
    """
    names = list(runs)
    first = names[0] if baseline is None and names else baseline
    if len(names) < 2 or first is None:
        raise ConfigError(f"compare got runs of {names}: expected at least two names with runs")
    if first not in runs:
        raise ConfigError(f"baseline = '{first}': expected one of {', '.join(names)}")
    for name in names:
        seeds = [run.seed for run in runs[name]]
        if not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(f"{name} has runs of seeds {seeds}: expected at least one run, and each seed once")
    _check_alike([run for each in runs.values() for run in each])
    trained = [_trained(name, run) for name, each in runs.items() for run in each]
    others = [name for name in names if name != first]
    findings = find(trained, Question(first, names, declared=others))
    return Comparison(findings, _table(findings, trained, first))


def _check_alike(runs: Sequence[Run]) -> None:
    """Raise `ConfigError` if runs differ in something that a verdict assumes to be equal."""
    sizes = {str(run.model.config.sizes) + str(run.model.config.shift) + str(run.model.config.scale) for run in runs}
    lengths = {run.params.train.steps for run in runs}
    networks = {run.params.model.name for run in runs}
    objectives = {run.params.diffusion.model_dump_json() for run in runs}
    for what, found in (("latents", sizes), ("train.steps", lengths), ("networks", networks), ("diffusion", objectives)):
        if len(found) > 1:
            detail = f": {sorted(map(str, found))}" if what in ("train.steps", "networks") else ""
            raise ConfigError(f"the runs have different {what}{detail}; compare runs that agree in them")


def _trained(name: str, run: Run) -> Trained:
    end, curve = run.outcome.final, run.history
    return Trained(
        strategy=name,
        seed=run.seed,
        rate=run.params.train.learning_rate,
        place=(),
        error=end.ema_validation_mse if end else None,
        steps=tuple(float(step) for step in curve["step"]),
        errors=tuple(float(error) for error in curve["validation_mse"]),
        zero_output_error=run.outcome.initial.target_second_moment,
        data=DATA,
        network=run.params.model.name,
        length=run.params.train.steps,
    )


def _table(findings: Findings, runs: Sequence[Trained], baseline: str) -> pd.DataFrame:
    rows = []
    errors = [run.error for run in runs if run.strategy == baseline and ended(run.error)]
    base = {"strategy": baseline, "n": len(errors), "answer": "baseline", "mean_difference": 0.0 if errors else None}
    rows.append(base)
    for pair in findings.pairs:
        judged = pair.judgement
        rows.append(
            {
                "strategy": pair.strategy,
                "learning_rate": pair.rate,
                "n": judged.n,
                "answer": judged.answer,
                "mean_difference": judged.mean,
                "low": judged.low,
                "high": judged.high,
                "p": judged.p,
            }
        )
    columns = ["strategy", "learning_rate", "n", "answer", "mean_difference", "low", "high", "p"]
    return pd.DataFrame(rows, columns=columns)

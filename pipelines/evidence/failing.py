"""Tables of answers.md about runs that failed or spiked: how many, and what moved before they did."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from dit.analysis.study import Place
from pipelines.evidence.judging import survived
from pipelines.evidence.markdown import by_rate, table, words
from pipelines.evidence.results import Ended

QUANTITIES = {"gradient_norm": "gradient norm", "loss": "loss", "mse": "error"}
"""The quantities of every step in `Ended.warned.lead`, in words."""
EVERY = "all"


def failures(runs: Sequence[Ended]) -> list[str]:
    """How many runs of each start failed at each rate, with totals; nothing if none failed."""
    if all(survived(run) == 1 for run in runs):
        return []
    rates = sorted({run.rate for run in runs})
    groups = [(f"`{name}`", words(place), mine) for name, place, mine in _groups(runs)]
    if len({tuple(run.place) for run in runs}) > 1:
        groups += [(f"`{name}`", EVERY, mine) for name, mine in _by_start(runs)]
    groups.append((EVERY, "", list(runs)))
    rows = [
        (name, place, *(_failed([run for run in mine if run.rate == rate]) for rate in rates), _failed(mine))
        for name, place, mine in groups
    ]
    return table(("start", "factors", *by_rate("runs that failed", rates), "at all rates"), rows)


def _failed(runs: Sequence[Ended]) -> str:
    """`2 + 1 of 5`: two collapsed or diverged, one finished but never learned."""
    if not runs:
        return ""
    failed = sum(run.failed_at is not None for run in runs)
    never = sum(run.failed_at is None and survived(run) < 1 for run in runs)
    return f"{failed} + {never} of {len(runs)}" if never else f"{failed} of {len(runs)}"


def spiked(runs: Sequence[Ended]) -> list[str]:
    """How many runs of each start spiked at each rate and finished, and how high their errors are; nothing if none did."""
    finished = [run for run in runs if run.error is not None]
    rates = sorted({run.rate for run in finished if run.spikes})
    if not rates:
        return []
    rows = []
    for name, place, mine in _groups(finished):
        cells = [_spiked([run for run in mine if run.rate == rate]) for rate in rates]
        if any(cells):
            rows.append((f"`{name}`", words(place), *cells))
    return table(("start", "factors", *by_rate("runs that spiked and finished", rates)), rows)


def _spiked(runs: Sequence[Ended]) -> str:
    """`1 of 7 (x 3.5)`: the highest final error of those that spiked over the mean final error of the others."""
    high = [run.error for run in runs if run.spikes and run.error is not None]
    others = [run.error for run in runs if not run.spikes and run.error is not None]
    if not high:
        return ""
    return f"{len(high)} of {len(runs)}" + (f" (\u00d7 {max(high) / statistics.fmean(others):.3g})" if others else "")


def first_to_rise(runs: Iterable[Ended]) -> list[str]:
    """Which quantity of every step was the first to leave its range before a failure, with counts and median leads."""
    warned = [run.warned for run in runs if run.warned is not None]
    found: dict[str, list[int | None]] = {}
    for one in warned:
        most = max(one.lead.values(), default=0)
        first = [word for name, word in QUANTITIES.items() if one.lead.get(name) == most]
        named = {0: "none", 1: f"{''.join(first)} alone"}.get(len(first), f"{', '.join(first)}: at the same step")
        found.setdefault(named, []).append(most if first else None)
    columns = ("what left its range first", f"runs, of {len(warned)} that failed", "lead, steps (median)")
    return table(columns, _counted(found))


def most_changed(runs: Iterable[Ended]) -> list[str]:
    """Which indicator had changed most at the last diagnosis before a failure, with counts and how long before that was."""
    warned = [run.warned for run in runs if run.warned is not None]
    found: dict[str, list[int | None]] = {}
    for one in warned:
        sign = one.sign or {"indicator": "nothing that was diagnosed"}
        found.setdefault(sign["indicator"].replace("_", " "), []).append(sign.get("steps_before"))
    columns = (
        "what had changed most at the last diagnosis before a failure",
        f"runs, of {len(warned)} that failed",
        "diagnosed earlier by, steps (median)",
    )
    return table(columns, _counted(found))


def _counted(found: dict[str, list[int | None]]) -> list[tuple[str, str, str]]:
    """Rows of a name, how often it occurred, and the median of its numbers; the most frequent first."""
    rows = []
    for name, numbers in sorted(found.items(), key=lambda one: -len(one[1])):
        known = [number for number in numbers if number is not None]
        rows.append((name, str(len(numbers)), f"{statistics.median(known):g}" if known else ""))
    return rows


def _groups(runs: Sequence[Ended]) -> list[tuple[str, Place, list[Ended]]]:
    """The runs of each start at each place."""
    places = list(dict.fromkeys(tuple(run.place) for run in runs))
    found = [
        (name, place, [run for run in mine if tuple(run.place) == place]) for name, mine in _by_start(runs) for place in places
    ]
    return [(name, place, mine) for name, place, mine in found if mine]


def _by_start(runs: Sequence[Ended]) -> list[tuple[str, list[Ended]]]:
    names = dict.fromkeys(run.strategy for run in runs)
    return [(name, [run for run in runs if run.strategy == name]) for name in names]

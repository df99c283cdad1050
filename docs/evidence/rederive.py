"""Compute the declared verdicts again from the results in this folder, without the project's code.

Run `python docs/evidence/rederive.py`. It needs numpy, scipy and ruamel.yaml, prints each declared answer, and exits with 1 if
any of them differs from the project's own (`answers.json`), or if the results of a study in `answers.json` are missing. The
rules are those of README.md: seeds that choose rates report nothing, the optimum is the vertex of a parabola through the mean
log errors at the best rate and its neighbours, parabolas must fit the errors of every seed, tests are Student's over seeds, and
Holm's method corrects the declared ones of a study together.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML
from scipy import stats

HERE = Path(__file__).parent
BASELINE = "adaln_zero"
"""The baseline of a study whose profile names no other."""
LEVEL = 0.05
FARTHEST = 0.05
"""How far a seed's parabola may lie from the lowest of its three errors at the best rate, as a fraction."""


def main() -> int:
    """Compare every study that has results or answers; returns the exit code."""
    questions = YAML(typ="safe").load((HERE / "questions.yaml").read_text())
    theirs = json.loads((HERE / "answers.json").read_text())
    differ = 0
    for name in dict.fromkeys([*questions, *theirs]):
        path = HERE / f"{name}.json"
        if path.exists() and name in questions:
            differ += compare(name, json.loads(path.read_text()), questions[name], theirs.get(name, []))
        elif name in theirs:
            print(
                f"{name}: DIFFERS: answers.json has this study, but {'its question' if path.exists() else path.name} is missing"
            )
            differ += 1
    return int(differ > 0)


def compare(name: str, study: dict, asked: dict, theirs: list[dict]) -> int:
    """Print every declared answer of one study; returns how many differ."""
    done, planned = len(study["runs"]), study["planned"]
    if done < planned:
        mine = []
        print(f"{name}: cut, {done} of {planned} runs have ended, so it has no answers yet")
    else:
        mine = effects(study, asked["effects"]) if "effects" in asked else comparisons(study)
        print(f"{name}: {len(mine)} declared")
    differ = 0
    for one, other in itertools.zip_longest(mine, theirs):
        same = agree(one, other)
        differ += not same
        print(f"  {'agrees ' if same else 'DIFFERS'} {show(one)}" + ("" if same else f"  against {show(other)}"))
    return differ


def comparisons(study: dict) -> list[dict]:
    """Each declared strategy against the baseline: at its own best rate where seeds choose it, else at each rate."""
    values = study["values"]
    baseline = values.get("study.baseline", BASELINE)
    chosen = values.get("study.choose_on", [])
    report = sorted({run["seed"] for run in study["runs"]} - set(chosen))
    errors: dict[tuple, dict[float, dict[int, float]]] = {}
    for run in study["runs"]:
        place = tuple(map(tuple, run["place"]))
        value = math.nan if run["error"] is None else run["error"]
        errors.setdefault((run["strategy"], place), {}).setdefault(run["rate"], {})[run["seed"]] = value
    places = list(dict.fromkeys(place for _, place in errors))
    found = []
    for strategy in (name for name in values["study.strategies"] if name in values.get("study.declared", [])):
        for place in places:
            one, base = errors[strategy, place], errors[baseline, place]
            asked = {"strategy": strategy, "place": dict(place)}
            if chosen:
                found.append(({**asked, "rate": None}, *at_best(one, base, chosen, report)))
            else:
                found += [({**asked, "rate": rate}, *paired(one[rate], base[rate])) for rate in sorted(one)]
    return judged(found)


def at_best(one: dict, base: dict, chosen: list[int], report: list[int]) -> tuple[list[float], list[float], bool]:
    """Errors of the reporting seeds, interpolated at the optimum of each side, and whether a verdict is allowed."""
    sides, sure = [], True
    for side in (one, base):
        rates = sorted(side)
        means = [np.mean([math.log(side[rate][seed]) for seed in chosen]) for rate in rates]
        best = int(np.nanargmin(means))
        near = rates[best - 1 : best + 2] if 0 < best < len(rates) - 1 else []
        whole = all(math.isfinite(side[rate].get(seed, math.nan)) for rate in near for seed in [*report, *chosen])
        if not near or not whole:
            sure = False
            break
        offsets = np.log(near) - math.log(rates[best])
        curvature, slope, _ = np.polyfit(offsets, means[best - 1 : best + 2], 2)
        vertex = -slope / (2 * curvature)
        curves = {seed: np.polyfit(offsets, [math.log(side[rate][seed]) for rate in near], 2) for seed in [*report, *chosen]}
        found = {seed: float(np.exp(np.polyval(curve, vertex))) for seed, curve in curves.items()}
        lowest = {seed: min(side[rate][seed] for rate in near) for seed in found}
        sure = sure and all(abs(found[seed] / lowest[seed] - 1) <= FARTHEST for seed in found)
        sides.append([found[seed] for seed in report])
    if not sure:
        sides = [[side[best_rate(side, chosen)].get(seed, math.nan) for seed in report] for side in (one, base)]
    return sides[0], sides[1], sure


def best_rate(side: dict, chosen: list[int]) -> float:
    """The measured rate with the lowest mean log error over the seeds that choose."""
    rates = sorted(side)
    return rates[int(np.nanargmin([np.mean([math.log(side[rate][seed]) for seed in chosen]) for rate in rates]))]


def paired(one: dict, base: dict) -> tuple[list[float], list[float], bool]:
    """Errors of both sides by seed, and whether a verdict is allowed: no run failed."""
    seeds = sorted(one.keys() & base.keys())
    sides = [one[seed] for seed in seeds], [base[seed] for seed in seeds]
    return *sides, all(map(math.isfinite, [*sides[0], *sides[1]]))


def judged(found: list[tuple]) -> list[dict]:
    """Paired t-tests, corrected together; a comparison without a verdict counts as p = 1."""
    tests = []
    for asked, one, base, sure in found:
        pairs = [(a, b) for a, b in zip(one, base, strict=True) if math.isfinite(a) and math.isfinite(b)]
        of_baseline = [b for _, b in pairs]
        differences = np.array([(a - b) / np.mean(of_baseline) for a, b in pairs])
        tests.append((asked, differences, float(stats.ttest_1samp(differences, 0).pvalue) if sure else 1.0, sure))
    corrected = holm([p for *_, p, _ in tests])
    return [
        {**asked, **interval(differences), "p": p if sure else None, "verdict": verdict(differences, p, sure)}
        for (asked, differences, _, sure), p in zip(tests, corrected, strict=True)
    ]


def verdict(differences: np.ndarray, p: float, sure: bool) -> str:
    """What may be said of a difference of errors."""
    if not sure:
        return "no verdict"
    if p >= LEVEL:
        return "not distinguishable"
    return "better" if differences.mean() < 0 else "worse"


def effects(study: dict, asked: dict) -> list[dict]:
    """Declared main effects: within each seed the mean change over all combinations of the other factors."""
    named = asked.get("strategies", {})
    rows = []
    for run in study["runs"]:
        if named and run["strategy"] not in named:
            continue
        levels = {**dict(map(tuple, run["place"])), "learning rate": f"{run['rate']:g}", "strategy": run["strategy"]}
        rows.append(({**levels, **named.get(run["strategy"], {})}, run["seed"], quantity(run, asked["quantity"])))
    others = {factor: sorted({levels[factor] for levels, _, _ in rows}) for factor in asked["factors"]}
    cells = {(tuple(levels[factor] for factor in others), seed): value for levels, seed, value in rows}
    seeds = sorted({seed for _, seed in cells})
    first = {factor: next(levels[factor] for levels, _, _ in rows) for factor in others}
    found = []
    for one in asked["declared"]:
        ((factor, level),) = one.items()
        rest = [values for other, values in others.items() if other != factor]
        place = list(others).index(factor)
        changes = []
        for seed in seeds:
            pairs = [
                [cells[(*combination[:place], chosen, *combination[place:]), seed] for chosen in (level, first[factor])]
                for combination in itertools.product(*rest)
            ]
            changes.append(np.mean([a - b for a, b in pairs]))
        found.append((one, np.array(changes)))
    corrected = holm([float(stats.ttest_1samp(changes, 0).pvalue) for _, changes in found])
    scale = math.expm1 if asked["quantity"] == "error" else float
    return [
        {
            "effect": one,
            **{key: value if key == "n" else scale(value) for key, value in interval(changes).items()},
            "p": p,
            "verdict": "clear" if p < LEVEL else "not distinguishable",
        }
        for (one, changes), p in zip(found, corrected, strict=True)
    ]


def quantity(run: dict, name: str) -> float:
    """The logarithm of the final error, or the share of its steps that a run survived."""
    if name == "error":
        return math.log(run["error"])
    if run["failed_at"] is not None:
        return run["failed_at"] / run["length"]
    return 0.0 if run["error"] > 0.5 * run["zero_output_error"] else 1.0


def interval(values: np.ndarray) -> dict:
    """Mean and Student's 95 % interval; fewer than three values give no interval, and none give no mean."""
    if len(values) < 3:
        return {"mean": float(values.mean()) if len(values) else None, "low": None, "high": None, "n": len(values)}
    reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    mean = float(values.mean())
    return {"mean": mean, "low": mean - float(reach), "high": mean + float(reach), "n": len(values)}


def holm(values: list[float]) -> list[float]:
    """The k-th smallest of m p-values times m - k + 1, never below a smaller one."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def agree(one: dict | None, other: dict | None) -> bool:
    """Whether both say the same of the same effect or comparison, up to rounding."""
    same = ("effect", "strategy", "place", "rate", "verdict", "n")
    if one is None or other is None or any(one.get(key) != other.get(key) for key in same):
        return False
    return all(close(one[key], other[key]) for key in ("mean", "low", "high", "p"))


def close(one: float | None, other: float | None) -> bool:
    """Whether two numbers are equal up to rounding, or both are missing."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


def show(one: dict | None) -> str:
    """One answer in a line."""
    if one is None:
        return "nothing"
    levels = one.get("effect") or one["place"]
    rate = "each at its own best rate" if one.get("rate") is None else f"at rate {one['rate']:g}"
    named = [] if "effect" in one else [one["strategy"]]
    what = ", ".join([*named, *(f"{factor} {level}" for factor, level in levels.items()), *([rate] if named else [])])
    p = "" if one["p"] is None else f", p = {one['p']:.3g}"
    mean, low, high = ("none" if one[key] is None else f"{one[key]:+.4f}" for key in ("mean", "low", "high"))
    return f"{what}: {mean} [{low}, {high}], n = {one['n']}{p}: {one['verdict']}"


if __name__ == "__main__":
    sys.exit(main())

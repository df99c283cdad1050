"""Names of flow runs and quick trials: a few words about what they run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit import yamlfile
from dit.errors import UserError

MOST_LETTERS = 120
MOST_OF_EXPERIMENT = 32
MOST_NAMED = 2
"""Up to this many strategies are named; of more, the first is named and the others are counted."""


def flow_run(root: Path, given: Mapping[str, Any]) -> str:
    """The name of a run of flow `study` with the parameters `given`, such as "study adaln_zero vs 3 others, train.steps=300".

    Wrong parameters give a name as well; the flow reports what is wrong with them.
    """
    overrides = given.get("overrides") or {}
    profile = f"profile {given['profile']}" if given.get("profile") else ""
    others = {key: value for key, value in overrides.items() if key != "study.strategies"}
    targets = f"only {', '.join(given['targets'])}" if given.get("targets") else ""
    compared = _compared(root, given.get("strategies") or overrides.get("study.strategies"))
    return short(", ".join(filter(None, (f"study {compared}".strip(), profile, targets, trial(others)))))


def trial(overrides: Mapping[str, Any]) -> str:
    """What a quick trial changes, such as "train.steps=300, study.seeds=[0]"; empty if it changes nothing."""
    return short(", ".join(f"{key}={value}".replace(" ", "") for key, value in overrides.items()))


def experiment(flow_run_name: str, run_id: str) -> str:
    """The name of a DVC experiment: what its flow run changes, or else what it runs, short enough for a table's column."""
    changed = flow_run_name.partition(", ")[2] or flow_run_name
    words = re.sub(r"[^A-Za-z0-9]+", "-", changed)[:MOST_OF_EXPERIMENT].strip("-")
    return f"{words}-{run_id[-6:]}"


def short(text: str) -> str:
    """The first line of a text, at most `MOST_LETTERS` long."""
    line = text.split("\n", 1)[0]
    return line if len(line) <= MOST_LETTERS else line[: MOST_LETTERS - 1] + "…"


def _compared(root: Path, strategies: Any) -> str:
    """The strategies of a study, the baseline first."""
    try:
        study = yamlfile.read(root / "params.yaml")["study"]
        baseline, named = str(study["baseline"]), list(strategies or study["strategies"])
    except (UserError, OSError, KeyError, TypeError):
        return ""
    others = [str(name) for name in named if name != baseline]
    if not others:
        return baseline
    return f"{baseline} vs {' and '.join(others) if len(others) <= MOST_NAMED - 1 else f'{len(others)} others'}"

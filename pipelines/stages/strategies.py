"""Stage `strategies`: the rules of every strategy of the study, one file each, so that an edit reruns its own runs alone.

They may stand in the library or in params.yaml, and may share rules. DVC compares what comes out here: a comment, another
layout, or a strategy that the study does not name changes nothing below.
"""

from __future__ import annotations

from pathlib import Path

from dit.config import Params
from dit.init import Strategy
from pipelines.files import complete_directory, write_json
from pipelines.stages.entry import run_dvc_stage


def strategies(params: Params) -> None:
    """Write `runs/strategies`: `<name>.json` with the rules, and `<name>.about.json` with what only the report shows."""
    with complete_directory("runs/strategies") as out:
        for name in params.study.strategies:
            write(params.strategies[name], out, name)
    print(f"strategies: {', '.join(params.study.strategies)}")


def write(strategy: Strategy, directory: Path, name: str) -> None:
    """The two files of one strategy."""
    write_json(directory / f"{name}.json", strategy.resolved)
    write_json(directory / f"{name}.about.json", {"description": strategy.description, "source": strategy.source})


if __name__ == "__main__":
    run_dvc_stage(strategies)

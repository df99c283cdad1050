"""Stage `design`: for each stage of the study, write one file with everything but the inputs that determines the stage.

DVC compares these files, so an edit of params.yaml reruns only the runs that it concerns: another layout of the file or an
unused strategy reruns nothing. The lock file stays small.
"""

from __future__ import annotations

from pathlib import Path

from dit import design as designs
from dit.config import Params, load
from dit.errors import UserError
from pipelines import design
from pipelines.files import complete_directory, write_json
from pipelines.stages.entry import exit_codes


def write_design(params: Params) -> None:
    """Check every combination, and write `runs/design`.

    Raises `UserError` if DVC read a `design.yaml` that lists other runs, because DVC cannot read it again within one command.
    """
    valid = designs.check(params)
    stages = design.items(params)
    if design.write(Path(), params):
        count = len(stages["train"])
        raise UserError(
            f"{design.FILE} did not list the runs of params.yaml. It does now ({count} runs): run the same command again"
        )
    with complete_directory(design.OUT) as out:
        for stage, items in stages.items():
            (out / stage).mkdir()
            for item in items.values():
                here = valid.get(item.setting.values) or params.with_values(item.setting.levels)
                write_json(out / stage / item.identity_file.name, design.identity(here, item))
        write_json(out / "compare" / f"{design.ALL}.samples.json", {"sampled": params.study.sample})
    print(f"design: {len(stages['train'])} runs of {len(params.study.strategies)} strategies")


if __name__ == "__main__":
    with exit_codes():
        write_design(load())

"""Stage `best`: choose for each strategy the setting with the lowest final validation error; only its runs are sampled."""

from __future__ import annotations

import statistics
from math import log

from dit import design as designs
from dit.config import Params
from dit.design import Run
from pipelines.design import Item
from pipelines.files import complete_directory, write_json
from pipelines.records.training import TRAIN, TrainRecord
from pipelines.stages.entry import run_dvc_stage


def best(params: Params, item: Item) -> None:
    """Choose on the seeds of `study.choose_on`, or on all, and write `runs/best/<strategy>.json`."""
    found = designs.design(params.study)
    with complete_directory(item.out) as out:
        for strategy in params.study.strategies:
            runs = [run for run in found.runs if run.strategy == strategy]
            setting = _chosen(runs, params.study.choose_on or params.study.seeds)
            names = {str(run.seed): run.name for run in runs if run.setting.name == setting}
            keys = {seed: TrainRecord.read(TRAIN / name).run_key for seed, name in names.items()}
            write_json(out / f"{strategy}.json", {"setting": setting, "runs": names, "run_keys": keys})
            print(f"best: {strategy} at {setting or 'the parameters of the study'}")


def _chosen(runs: list[Run], seeds: list[int]) -> str:
    """The setting with the fewest failed runs and, among these settings, the lowest geometric mean of the final error."""

    def rank(setting: str) -> tuple[int, float]:
        finals = [TrainRecord.read(TRAIN / run.name).final for run in runs if run.setting.name == setting and run.seed in seeds]
        errors = [final.ema_validation_mse for final in finals if final and final.ema_validation_mse]
        return len(finals) - len(errors), statistics.fmean(map(log, errors)) if errors else 0.0

    return min(dict.fromkeys(run.setting.name for run in runs), key=rank)


if __name__ == "__main__":
    run_dvc_stage(best, "best")

"""The runs of a study follow from its factors: each combination once, with names that last, sharing whatever they agree in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from hypothesis import given, strategies as st
from studies import MICRO, ROOT, run_stage

from dit import config, yamlfile
from dit.config import Params
from dit.design import check, design, distinct
from dit.errors import ConfigError
from pipelines import design as stages
from pipelines.overrides import override
from pipelines.records.evaluation import EvaluateRecord
from pipelines.records.training import TrainRecord
from pipelines.report.places import place_of
from pipelines.stages.autoencoder import autoencoder
from pipelines.stages.best import best
from pipelines.stages.evaluate import evaluate
from pipelines.stages.features import features
from pipelines.stages.images import images
from pipelines.stages.latents import latents
from pipelines.stages.train import train

RATES = {"train.learning_rate": [0.001, 0.004]}


def study(**changes: Any) -> Params:
    """The micro study with other keys of its section `study`."""
    text = override((ROOT / "params.yaml").read_text(), MICRO | {f"study.{key}": value for key, value in changes.items()})
    return config.parse(yamlfile.parse(text, "test"), "test")


def names(params: Params) -> list[str]:
    return [run.name for run in design(params.study).runs]


def test_without_factors_runs_are_strategies_and_seeds() -> None:
    params = study(factors={}, only={})
    assert names(params) == ["adaln_zero-0", "adaln_zero-1", "symmetric-0", "symmetric-1"]
    assert check(params) == {"[]": params}


def test_factors_are_crossed_and_named_by_their_levels() -> None:
    params = study(factors=RATES | {"model.name": ["DiT-Micro/2", "DiT-Micro/4"]}, seeds=[3])
    assert names(params)[:4] == [
        f"adaln_zero-learning_rate={rate},model=DiT-Micro_{patch}-3" for rate in ("0.001", "0.004") for patch in (2, 4)
    ]
    run = design(params.study).named("symmetric-learning_rate=0.004,model=DiT-Micro_4-3")
    here = params.with_values(run.setting.levels)
    assert (here.train.learning_rate, here.model.name, here.train.steps) == (0.004, "DiT-Micro/4", params.train.steps)


@given(
    st.lists(st.floats(1e-8, 1.0), min_size=1, max_size=6, unique=True),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(0, 100), min_size=1, max_size=4, unique=True),
)
def test_every_combination_is_one_run_of_its_own_name(rates: list[float], steps: list[int], seeds: list[int]) -> None:
    section = {"name": "x", "baseline": "a", "strategies": ["a", "b"], "seeds": seeds}
    made = config.StudyParams.model_validate(section | {"factors": {"train.learning_rate": rates, "train.steps": steps}})
    runs = design(made).runs
    assert len({run.name for run in runs}) == len(runs) == 2 * len(rates) * len(steps) * len(seeds)
    assert len({(run.strategy, run.seed, run.setting.values) for run in runs}) == len(runs)


def test_another_level_leaves_the_names_of_all_other_runs() -> None:
    fewer, more = (set(names(study(factors={"train.learning_rate": rates}))) for rates in ([1e-3, 4e-3], [1e-3, 2e-3, 4e-3]))
    assert fewer < more


def test_named_settings_stand_in_place_of_a_product() -> None:
    params = study(
        settings={"small": {"train.learning_rate": 0.001}, "large": {"train.learning_rate": 0.004, "train.steps": 8}}
    )
    assert names(params)[:2] == ["adaln_zero-small-0", "adaln_zero-small-1"]
    assert [found.train.steps for found in check(params).values()] == [60, 8]


def test_named_settings_that_differ_in_the_learning_rate_alone_are_one_place_with_several_rates() -> None:
    shared = {"train.optimizer.betas": [0.9, 0.95], "train.steps": 8}
    params = study(settings={name: {"train.learning_rate": rate, **shared} for name, rate in (("low", 1e-3), ("high", 4e-3))})
    assert {place_of(params, run) for run in design(params.study).runs} == {(("betas", "[0.9, 0.95]"), ("steps", "8"))}


def test_one_strategy_may_have_levels_or_a_value_of_its_own() -> None:
    params = study(factors=RATES, only={"symmetric": {"train.learning_rate": [0.01], "train.steps": 8}}, seeds=[0])
    assert names(params)[2:] == ["symmetric-learning_rate=0.01-0"]
    assert [found.train.steps for found in check(params).values()] == [60, 60, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": {"train.stepps": [1, 2]}}, "test: adaln_zero at stepps=1: train.stepps is not a known key"),
        (
            {"factors": {"nowhere.steps": [1]}},
            "adaln_zero at steps=1: nowhere.steps is not a known key; ((?!study).)*$",
        ),
        ({"factors": {"train.steps": [1, 0]}}, "adaln_zero at steps=0: train.steps = 0"),
        ({"factors": {"study.seeds": [1]}}, r"factors\.study\.seeds: expected a dotted key of params.yaml, such as train"),
        ({"factors": {"train.steps": []}}, r"factors\.train\.steps = \[\]: expected at least one level"),
        ({"factors": {"train.steps": [5, 5]}}, r"factors\.train\.steps = \[5, 5\]: expected .* each level once"),
        ({"factors": RATES, "settings": {"a": {"train.steps": 2}}}, "factors and settings are both given"),
        ({"factors": {"train.optimizer": [{"name": "sgd"}]}}, "cannot be part of a name; name the levels"),
        (
            {"settings": {"a": {"train.steps": 2}}, "only": {"symmetric": {"train.steps": [1, 2]}}},
            r"only\.symmetric\.train\.steps gives levels, which settings do not have",
        ),
        ({"factors": {"train.steps": {"x" * 190: 1}}}, "which is longer than 200 letters; name the levels"),
        ({"only": {"nobody": {"train.steps": 1}}}, "study.only: unknown strategy 'nobody'; expected one of adaln_zero"),
        ({"declared": ["adaln_zero"]}, "declared: 'adaln_zero' is the baseline"),
        ({"factors": {"train.steps": list(range(1, 1002))}}, r"factors\.train\.steps has 1,001 levels: expected at most 1000"),
        (
            {"factors": {key: list(range(1, 101)) for key in ("train.steps", "train.batch_size", "train.log_every")}},
            "study.factors: 1,000,000 settings of adaln_zero; expected at most 1000",
        ),
        ({"seeds": list(range(6000))}, "its strategies, factors and seeds make 12,000 runs; expected at most 10,000"),
        (
            {"factors": {"model.depth": [800, 801, 802]}},
            "the first 2 settings of the study have 1,601 blocks in 2 networks; expected at most 1000 settings and 1,500",
        ),
        ({"choose_on": [0]}, r"choose_on = \[0\] leaves 1 of the seeds \[0, 1\] to report: expected at least 3"),
    ],
)
def test_a_design_that_cannot_be_is_one_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(study(**changes), "test")


def test_factors_branch_the_data_that_they_touch_and_share_the_rest() -> None:
    params = study(factors=RATES | {"images.size": [16, 32]})
    found = stages.items(params)
    assert list(found["images"]) == list(found["latents"]) == ["size=16", "size=32"]
    item = found["train"]["adaln_zero-learning_rate=0.004,size=32-1"]
    assert item.inputs == {"latents": "data/latents/size=32"}
    assert list(found["analyse"]) == [f"{name}-size={size}" for name in ("adaln_zero", "symmetric") for size in (16, 32)]
    assert list(stages.items(study(factors=RATES))["latents"]) == ["all"]
    assert distinct(design(params.study).settings(), ("train",)).keys() == {"learning_rate=0.001", "learning_rate=0.004"}


def test_only_the_best_setting_of_each_strategy_is_sampled_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIT_SCRATCH", raising=False)
    params = study(factors=RATES, sample="best")
    for stage in (images, autoencoder, latents, features):
        run_stage(stage, params)
    found = stages.items(params)
    for run in found["train"]:
        run_stage(train, params, run)
    run_stage(best, params)
    chosen = json.loads(Path("runs/best/adaln_zero.json").read_text())
    start = "adaln_zero-learning_rate="
    finals = {name: TrainRecord.read(Path("runs/train", name)).final for name in found["train"] if name.startswith(start)}
    errors = {name: final.ema_validation_mse for name, final in finals.items() if final}
    both = {rate: errors[f"{start}{rate}-0"] * errors[f"{start}{rate}-1"] for rate in ("0.001", "0.004")}
    assert chosen["setting"] == f"learning_rate={min(both, key=both.__getitem__)}"
    assert list(found["evaluate"]) == ["adaln_zero-best-0", "adaln_zero-best-1", "symmetric-best-0", "symmetric-best-1"]
    assert list(stages.items(study(factors=RATES, sample="one"))["evaluate"]) == ["adaln_zero-best-0", "symmetric-best-0"]
    assert not stages.items(study(factors=RATES, sample="none"))["evaluate"]
    run_stage(evaluate, params, "adaln_zero-best-1")
    record = EvaluateRecord.read(Path("runs/evaluate/adaln_zero-best-1"))
    assert record.run == f"adaln_zero-{chosen['setting']}-1"
    assert record.train_run_key == chosen["run_keys"]["1"]


ALIASED = """
strategies:
  mine:
    rules: &mine
      - adaln_zero
      - {role: final.projection.weight, init: normal, std: 1.0e-3}
  biased:
    rules: [*mine, {role: final.projection.bias, init: constant, value: 0.5}]
"""


def test_what_dvc_exp_run_makes_of_params_changes_the_values_that_are_given_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = override((ROOT / "params.yaml").read_text(), MICRO).replace("strategies: {}\n", ALIASED.lstrip())
    path.write_text(text.replace("strategies: [adaln_zero, symmetric]", "strategies: [adaln_zero, mine, biased]"))
    before = config.load(path)
    apply_overrides(path, ["train.steps=61"])  # what `dvc exp run -S` does
    after = config.load(path)
    assert "*mine" not in path.read_text()
    assert after.train.steps == 61
    for stage, items in stages.items(before).items():
        for key, item in items.items():
            same = stages.identity(before, item) == stages.identity(after, stages.items(after)[stage][key])
            assert same == (stage != "train"), (stage, key)

"""The studies of docs/evidence: what is declared runs, and what is published follows from the committed results alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from studies import MICRO, ROOT

from dit import config, yamlfile
from dit.analysis import comparison
from dit.analysis.study import Findings, Question, Tuning
from dit.errors import ConfigError, UserError
from pipelines import design
from pipelines.evidence import comparing, failing, figures, judging, markdown, results, running, training, writing
from pipelines.evidence.__main__ import app
from pipelines.evidence.results import Ended, Results, Warned
from pipelines.overrides import override
from pipelines.stages.autoencoder import autoencoder
from pipelines.stages.images import images
from pipelines.stages.latents import latents
from pipelines.stages.train import train

PROFILES = sorted(file.stem for file in (ROOT / running.PROFILES).glob("*.yaml"))
TINY: dict[str, Any] = {
    **{key: value for key, value in MICRO.items() if not key.startswith(("study.", "autoencoder."))},
    "study.strategies": ["adaln_zero", "head_xavier"],
    "study.seeds": [0, 1, 2],
    "study.choose_on": [],
    "study.factors": {"train.steps": [2, 4]},
    "images.source": {
        "kind": "photos",
        "train_per_class": 8,
        "validation_per_class": 4,
        "validation_region": 0.25,
        "max_zoom": 3.0,
    },
    "autoencoder.threads": 1,
    "train.validate_every": 2,
}
"""Values that make a study of seconds of `delay`."""


UNLESS = " (unless factors say otherwise)"


def ended(strategy: str, rate: float, seed: int, error: float | None, **others: Any) -> Ended:
    """A run of 100 steps; the error of a zero output is 1."""
    values: dict[str, Any] = {"place": [], "failed_at": None, "spikes": 0, "warned": None, **others}
    status = "finished" if error is not None else "collapsed"
    return Ended(
        name=f"{strategy}-learning_rate={rate:g}-{seed}",
        strategy=strategy,
        seed=seed,
        rate=rate,
        own="",
        length=100,
        network="DiT-Tiny/4",
        data="photos",
        status=status,
        steps_done=100,
        initial=1.0,
        zero_output_error=1.0,
        error=error,
        steps=[],
        curve=[],
        **values,
    )


def copied(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / results.RESULTS, tmp_path / results.RESULTS)
    return tmp_path


def test_every_profile_asks_a_question_and_every_question_has_a_profile() -> None:
    assert sorted(judging.questions(ROOT)) == PROFILES


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_fits_the_parameters_of_today(name: str) -> None:
    values = yamlfile.read(ROOT / running.PROFILES / f"{name}.yaml")
    params = config.parse(yamlfile.parse(override((ROOT / "params.yaml").read_text(), values), name), name)
    assert set(params.study.declared) <= set(params.study.strategies)


def test_the_published_answers_are_those_of_the_committed_results(tmp_path: Path) -> None:
    root = copied(tmp_path)
    for path in (writing.PAGE, writing.NUMBERS):
        (root / path).unlink()
    writing.write(root)
    for path in (writing.PAGE, writing.NUMBERS):
        assert (root / path).read_text() == (ROOT / path).read_text()


def test_a_study_in_which_no_rate_has_a_mean_has_a_figure_too(tmp_path: Path) -> None:
    tuning = Tuning("adaln_zero", (), {1e-3: {}, 1e-2: {}}, None, None, "every run failed")
    findings = Findings(Question("adaln_zero", ["adaln_zero"]), (tuning,), (), (), None)
    ended = Results(study="cut", values={}, planned=2, made=[], runs=[])
    figures.draw(judging.Answers(ended, findings, None, None), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size


def test_answers_count_at_each_rate_the_runs_that_failed_and_those_that_never_learned() -> None:
    none, warm = [("schedule", "none")], [("schedule", "5_percent")]
    runs = [
        ended("adaln_zero", 0.01, 0, 0.1, place=none),
        ended("adaln_zero", 0.02, 0, None, failed_at=40, place=none),
        ended("adaln_zero", 0.01, 0, 0.1, place=warm),
        ended("adaln_zero", 0.02, 0, 0.6, place=warm),
    ]
    assert failing.failures(runs)[2:] == [
        "| `adaln_zero` | schedule none | 0 of 1 | 1 of 1 | 1 of 2 |",
        "| `adaln_zero` | schedule 5_percent | 0 of 1 | 0 + 1 of 1 | 0 + 1 of 2 |",
        "| `adaln_zero` | all | 0 of 2 | 1 + 1 of 2 | 1 + 1 of 4 |",
        "| all |  | 0 of 2 | 1 + 1 of 2 | 1 + 1 of 4 |",
    ]
    assert failing.failures(runs[::2]) == []


def test_answers_tell_what_moved_first_before_failures_and_how_many_steps_before() -> None:
    together = {"gradient_norm": 2, "loss": 2, "mse": 0}
    sign = {"indicator": "max_attention_logit", "steps_before": 30}
    warned = [
        Warned(lead={"gradient_norm": 5, "loss": 1}, sign=sign),
        Warned(lead={"gradient_norm": 8}, sign={**sign, "steps_before": 40}),
        Warned(lead=together, sign={"indicator": "residual_rms", "steps_before": 7}),
        Warned(lead={}, sign=None),
    ]
    runs = [ended("adaln_zero", 0.01, seed, None, failed_at=40, warned=one) for seed, one in enumerate(warned)]
    assert failing.first_to_rise(runs) == [
        "| what left its range first | runs, of 4 that failed | lead, steps (median) |",
        "|---|---|---|",
        "| gradient norm alone | 2 | 6.5 |",
        "| gradient norm, loss: at the same step | 1 | 2 |",
        "| none | 1 |  |",
    ]
    assert failing.most_changed(runs)[2:] == [
        "| max attention logit | 2 | 35 |",
        "| residual rms | 1 | 7 |",
        "| nothing that was diagnosed | 1 |  |",
    ]


def test_answers_name_runs_that_spiked_and_finished_and_how_high_they_ended() -> None:
    runs = [
        ended("adaln_zero", 0.01, seed, error, spikes=spikes) for seed, error, spikes in ((0, 0.1, 0), (1, 0.3, 2), (2, 0.1, 0))
    ]
    assert failing.spiked(runs)[2:] == ["| `adaln_zero` | 1 of 3 (\u00d7 3) |"]
    assert failing.spiked(runs[::2]) == []


def test_answers_compare_the_errors_of_the_published_start_at_all_rates() -> None:
    errors = {(0.01, 0): 0.2, (0.01, 1): 0.2, (0.01, 2): 0.2, (0.02, 0): 0.15, (0.02, 1): 0.16, (0.02, 2): 0.17}
    runs = [ended("adaln_zero", rate, seed, error) for (rate, seed), error in errors.items()]
    values = {"study.strategies": ["adaln_zero"]}
    found = judging.answer(Results(study="rates", values=values, planned=6, made=[], runs=runs), {}).findings
    assert comparing.of_baseline(found)[2] == "| `adaln_zero` | 0.2 | -20.0 % [-32.4, -7.6] |"


def test_where_settings_have_other_rates_each_is_compared_with_its_own_lowest() -> None:
    errors = {("4", 0.01): 0.2, ("4", 0.02): 0.1, ("56", 0.02): 0.2, ("56", 0.04): 0.3}
    runs = [
        ended("adaln_zero", rate, 0, error).model_copy(update={"place": [("depth", depth)]})
        for (depth, rate), error in errors.items()
    ]
    values = {"study.strategies": ["adaln_zero"]}
    found = judging.answer(Results(study="depths", values=values, planned=4, made=[], runs=runs), {}).findings
    assert comparing.of_baseline(found) == [
        "| start | factors | error at the lowest rate | difference from it, at rate 0.02 | at rate 0.04 |",
        "|---|---|---|---|---|",
        "| `adaln_zero` | depth 4 | 0.2 at 0.01 | -50.0 %, from 1 seed |  |",
        "| `adaln_zero` | depth 56 | 0.2 at 0.02 |  | +50.0 %, from 1 seed |",
    ]


def test_a_difference_from_fewer_than_three_seeds_has_no_interval_and_one_from_none_is_no_number() -> None:
    whole = comparison.Estimate(0.02, 0.01, 0.03, 3)
    assert markdown.size(whole) == "+2.0 % [+1.0, +3.0]"
    assert markdown.size(dataclasses.replace(whole, low=None, high=None, n=1)) == "+2.0 %, from 1 seed"
    assert markdown.size(dataclasses.replace(whole, low=None, high=None, n=2)) == "+2.0 %, from 2 seeds"
    assert markdown.size(dataclasses.replace(whole, low=None, high=None, n=0)) == "cannot be measured"


def test_settings_that_a_profile_does_not_name_are_those_of_the_parameters() -> None:
    train = yamlfile.read(ROOT / "params.yaml")["train"]
    for key, value in training.DEFAULTS.items():
        found: Any = train
        for name in key.split(".")[1:]:
            found = found[name]
        assert found == value


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("heads", "AdamW with β₂ = 0.999, constant rate, no warm-up, no clipping, EMA 0.99"),
        ("delay", "AdamW with β₂ = 0.95, linear rate, no warm-up, gradients clipped at norm 1, EMA 0.99"),
        ("stability", f"AdamW with β₂ = 0.999{UNLESS}, constant rate, no warm-up{UNLESS}, no clipping, EMA 0.99"),
        (
            "stability-muon",
            f"Muon in the blocks and AdamW elsewhere with β₂ = 0.999, constant rate, no warm-up{UNLESS}, no clipping, EMA 0.99",
        ),
        ("depth-pilot", f"AdamW with β₂ = 0.999{UNLESS}, constant rate, no warm-up, no clipping{UNLESS}, EMA 0.99"),
    ],
)
def test_answers_name_the_settings_of_the_optimiser(name: str, settings: str) -> None:
    values = yamlfile.read(ROOT / running.PROFILES / f"{name}.yaml")
    assert training.in_words(values) == settings
    assert training.constant_rate(values) == (name in {"heads", "depth-pilot"})


def drawn(name: str, folder: Path) -> str:
    """The figure of a study with committed results; it names each text in a comment."""
    whole = Results.read(ROOT / results.RESULTS / f"{name}.json")
    figures.draw(judging.answer(whole, judging.questions(ROOT)[name]), folder / "figure.svg")
    return (folder / "figure.svg").read_text()


def test_figures_explain_their_crosses_and_name_means_that_lie_above_the_axis(tmp_path: Path) -> None:
    again, modern = drawn("heads-again", tmp_path), drawn("modern", tmp_path)
    assert "<!-- a run failed -->" in again
    assert "<!-- a run failed -->" not in modern
    assert "<!-- ↑ 0.47 -->" in modern
    assert "<!-- ↑" not in again


def test_figures_say_what_is_an_interaction_and_name_levels_in_words(tmp_path: Path) -> None:
    attribution = drawn("attribution", tmp_path)
    assert "<!-- head: zero → Xavier \u00d7 learning rate: 0.001 → 0.004 -->" in attribution
    assert "<!-- change of the error, % (\u00d7 = interaction; filled: declared before the runs) -->" in attribution
    assert "<!-- warm-up over 5 % of the steps -->" in drawn("stability-muon", tmp_path)
    assert "<!-- final error, % higher than with the zero head -->" in drawn("delay", tmp_path)


def rederived(folder: Path) -> tuple[int, str]:
    """Exit code and output of the program that shares no code with the project."""
    found = subprocess.run([sys.executable, "-I", "rederive.py"], cwd=folder, check=False, capture_output=True, text=True)
    assert not found.stderr
    return found.returncode, found.stdout


def test_a_program_without_the_projects_code_finds_the_same_verdicts(tmp_path: Path) -> None:
    code, said = rederived(copied(tmp_path) / results.RESULTS)
    assert code == 0
    lines = [line for line in said.splitlines() if line.startswith("  ")]
    assert len(set(lines)) == len(lines) > 20
    assert "  agrees  head_xavier, steps 1000, at rate 0.002: +0.0522 [" in said


def test_that_program_notices_other_verdicts_and_verdicts_on_something_else(tmp_path: Path) -> None:
    root = copied(tmp_path) / results.RESULTS
    numbers = json.loads((root / "answers.json").read_text())
    numbers["delay"][0]["mean"] += 1e-4
    numbers["delay"][1]["strategy"] = "gates_one"
    numbers["delay"][2]["place"] = {"steps": "16001"}
    numbers["delay"][3]["rate"] = 0.001
    numbers["stability"][0]["effect"] = {"strategy": "gates_one"}
    (root / "answers.json").write_text(json.dumps(numbers))
    code, said = rederived(root)
    assert (code, said.count("DIFFERS")) == (1, 5)


def test_that_program_notices_results_that_are_missing_and_skips_studies_that_have_not_run(tmp_path: Path) -> None:
    root = copied(tmp_path) / results.RESULTS
    waiting = [name for name in PROFILES if not (root / f"{name}.json").exists()]
    (root / "delay.json").unlink()
    code, said = rederived(root)
    assert code == 1
    assert not any(f"{name}: " in said for name in waiting)
    assert "delay: DIFFERS: answers.json has this study, but delay.json is missing" in said


def test_that_program_takes_the_baseline_of_the_profile(tmp_path: Path) -> None:
    root = copied(tmp_path)
    path = root / results.RESULTS / "target.json"
    whole = Results.read(path)
    values = {**whole.values, "study.baseline": "head_xavier", "study.declared": ["adaln_zero"]}
    whole.model_copy(update={"values": values}).write(path)
    writing.write(root)
    code, said = rederived(root / results.RESULTS)
    assert code == 0
    assert "target: 3 declared" in said
    assert "  agrees  adaln_zero, objective v, each at its own best rate: -0.0" in said


def test_runs_of_the_pool_are_those_of_the_stages_to_the_bit_and_an_interrupted_study_goes_on(tmp_path: Path) -> None:
    place = running.prepare("delay", ROOT, tmp_path / "scratch", TINY)
    assert running.run(place, workers=2, minutes=0) == []
    assert place.done == []
    assert running.run(place, workers=2, minutes=10) == []
    assert len(place.done) == 12

    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(place.folder / "params.yaml", alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(alone)
        params, stages = config.load(), design.items(place.params)
        for stage, function in (("images", images), ("autoencoder", autoencoder), ("latents", latents)):
            function(params, stages[stage][design.ALL])
        item = stages["train"]["head_xavier-steps=4-1"]
        train(params.with_values(item.setting.levels), item)
    for file in ("validation.csv", "ema.safetensors", "run.json"):
        assert (alone / item.out / file).read_bytes() == (place.folder / item.out / file).read_bytes()

    found = results.collect("delay", place, TINY, results.made_here(place, ROOT, 2, 0.1))
    found.write(path := tmp_path / "delay.json")
    assert Results.read(path) == found
    assert found.complete
    answers = judging.answer(found, {"lengths": True})
    assert answers.findings is not None
    assert {pair.judgement.n for pair in answers.findings.pairs} == {3}


def test_the_runs_of_a_study_spread_over_all_gpus_and_each_process_sees_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "visible_gpus", lambda: ["3", "5"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with running._pools(tmp_path, 1) as pools:
        assert [pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() for pool in pools] == ["3", "5"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_results_of_other_code_or_data_are_not_mixed(tmp_path: Path) -> None:
    whole = Results.read(ROOT / results.RESULTS / "target-flow.json")
    whole.model_copy(update={"runs": whole.runs[:10]}).write(path := tmp_path / "target-flow.json")
    rest = whole.model_copy(update={"runs": whole.runs[5:]})
    assert sorted(run.name for run in rest.with_those_of(path).runs) == sorted(run.name for run in whole.runs)
    other = whole.model_copy(update={"made": [whole.made[0].model_copy(update={"code": "0" * 64})]})
    with pytest.raises(UserError, match=r"target-flow.json holds results of other code: give another --output"):
        other.with_those_of(path)


def test_a_study_is_refused_before_it_trains_if_its_file_holds_other_results(tmp_path: Path) -> None:
    command = ["run", "delay", "--workers=1", "--minutes=0", f"--scratch={tmp_path / 'scratch'}", f"--output={tmp_path}"]
    tiny = [f"--set={key}={json.dumps(value)}" for key, value in TINY.items()]
    assert typer.testing.CliRunner().invoke(app, [*command, *tiny]).exit_code == 0
    path = tmp_path / "delay.json"
    first = Results.read(path)
    place = running.prepare("delay", ROOT, tmp_path / "scratch", TINY)

    def refused(made: dict[str, Any], *others: str) -> str:
        first.model_copy(update={"made": [first.made[0].model_copy(update=made)]}).write(path)
        found = typer.testing.CliRunner().invoke(app, [*command, "--minutes=10", *tiny, *others])
        assert isinstance(found.exception, UserError)
        assert place.done == []
        return str(found.exception).removeprefix(f"{path} holds results of other ").removesuffix(", or remove it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "run", lambda *_: pytest.fail("data are made"))
        assert refused({"torch": "1.0"}) == f"torch (1.0, and here it is {torch.__version__}): give another --output"
        assert refused({"code": "0" * 64}) == "code: give another --output"
        assert refused({}, "--set=train.steps=7") == "values of parameters (train.steps): give another --output"
    digests = dict.fromkeys(first.made[0].data, "0" * 64)
    assert refused({"data": digests}) == f"data ({', '.join(digests)}): give another --output"


def test_a_study_that_was_cut_says_so_and_has_no_answers(tmp_path: Path) -> None:
    root = copied(tmp_path)
    whole = Results.read(root / results.RESULTS / "target-flow.json")
    kept = [run for run in whole.runs if run.seed != 4][:-1]
    whole.model_copy(update={"runs": kept}).write(root / results.RESULTS / "target-flow.json")
    writing.write(root)
    assert "**Cut: 47 of 56 runs have ended, so it has no answers yet.**" in (root / writing.PAGE).read_text()
    assert "target-flow" not in json.loads((root / writing.NUMBERS).read_text())
    code, said = rederived(root / results.RESULTS)
    assert code == 0
    assert "target-flow: cut, 47 of 56 runs have ended, so it has no answers yet" in said


def test_runs_that_the_file_of_results_holds_are_not_trained_again_on_another_machine(tmp_path: Path) -> None:
    def run(scratch: str) -> None:
        command = ["run", "delay", "--workers=2", f"--scratch={tmp_path / scratch}", f"--output={tmp_path}"]
        tiny = [f"--set={key}={json.dumps(value)}" for key, value in TINY.items()]
        assert typer.testing.CliRunner().invoke(app, [*command, *tiny]).exit_code == 0

    run("one")
    whole = Results.read(path := tmp_path / "delay.json")
    kept = [one for one in whole.runs if one.seed != 2]
    whole.model_copy(update={"runs": kept}).write(path)
    run("other")
    assert sorted(one.name for one in Results.read(path).runs) == sorted(one.name for one in whole.runs)
    place = running.prepare("delay", ROOT, tmp_path / "other", TINY)
    assert {one.seed for one in place.done} == {2}


def test_an_unknown_study_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profiles/evidence/haeds.yaml: no such profile; there are attribution, delay"):
        running.prepare("haeds", ROOT, tmp_path, {})

"""The studies of docs/evidence: what is declared runs, and what is published follows from the committed results alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from studies import MICRO, ROOT

from dit import config, yamlfile
from dit.analysis.study import Findings, Question, Tuning
from dit.errors import ConfigError, UserError
from pipelines import design
from pipelines.evidence import figures, judging, results, running, writing
from pipelines.evidence.results import Results
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


def test_a_program_without_the_projects_code_finds_the_same_verdicts_and_notices_another(tmp_path: Path) -> None:
    root = copied(tmp_path) / results.RESULTS
    command = [sys.executable, "-I", "rederive.py"]
    assert subprocess.run(command, cwd=root, check=False).returncode == 0
    numbers = json.loads((root / "answers.json").read_text())
    numbers["delay"][0]["mean"] += 1e-4
    (root / "answers.json").write_text(json.dumps(numbers))
    assert subprocess.run(command, cwd=root, check=False).returncode == 1


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
    answers = judging.answer(found, {"lengths": True})
    assert answers.complete
    assert answers.findings is not None
    assert {pair.judgement.n for pair in answers.findings.pairs} == {3}


def test_results_of_other_code_or_data_are_not_mixed(tmp_path: Path) -> None:
    whole = Results.read(ROOT / results.RESULTS / "target-flow.json")
    whole.model_copy(update={"runs": whole.runs[:10]}).write(path := tmp_path / "target-flow.json")
    rest = whole.model_copy(update={"runs": whole.runs[5:]})
    assert sorted(run.name for run in rest.with_those_of(path).runs) == sorted(run.name for run in whole.runs)
    other = whole.model_copy(update={"made": [whole.made[0].model_copy(update={"code": "0" * 64})]})
    with pytest.raises(UserError, match=r"target-flow.json holds results of other code: give another --output"):
        other.with_those_of(path)


def test_a_study_that_was_cut_says_so(tmp_path: Path) -> None:
    root = copied(tmp_path)
    whole = Results.read(root / results.RESULTS / "target-flow.json")
    kept = [run for run in whole.runs if run.seed != 4]
    whole.model_copy(update={"runs": kept}).write(root / results.RESULTS / "target-flow.json")
    writing.write(root)
    assert "**Cut: 48 of 56 runs have ended. Its verdicts are not to be quoted.**" in (root / writing.PAGE).read_text()


def test_an_unknown_study_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profiles/evidence/haeds.yaml: no such profile; there are attribution, delay"):
        running.prepare("haeds", ROOT, tmp_path, {})

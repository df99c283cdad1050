"""A kept checkpoint goes on as its run did, or under other parameters; a longer run goes on from a shorter one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from dit import checkpoint, init, models
from dit.cli import app
from dit.config import Params
from dit.continuation.request import find
from dit.continuation.results import COMPARISON, FILE
from dit.data.latents import LatentStore
from dit.data.store import StoreWriter
from dit.diffusion import Diffusion
from dit.models.dit.network import DiT
from dit.optim.carried import carried
from dit.optim.schedule import learning_rate
from dit.sections import TrainParams
from dit.training import loop
from dit.training.kept import BEFORE, ENDED, KEPT, RECENT, SUSPECT, Keeper, RunSettings, Shelf, kept_in
from dit.training.loop import Trainer
from dit.training.records import TABLES, Event

Build = Callable[..., Trainer]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.fixture
def trainer(params: Params, latents: LatentStore, micro: Callable[..., DiT], scratch: Path) -> Build:
    """Builds a run of 12 steps called micro-0, whose weights differ for every `seed`."""
    validation = params.train.validation.model_copy(update={"samples": 20})
    short = {"steps": 12, "batch_size": 8, "log_every": 3, "validate_every": 5, "checkpoint_every": 4, "diagnose_every": 6}
    model = params.model.model_copy(update={"name": "DiT-Micro/2"})

    def build(name: str = "micro-0", **changes: Any) -> Trainer:
        written = params.train.model_dump(mode="json") | {"validation": validation.model_dump()} | short | changes
        train = TrainParams.model_validate(written)
        settings = RunSettings(name=name, seed=0, model=model, diffusion=params.diffusion, train=train)
        diffusion = Diffusion(params.diffusion)
        network = init.apply(micro(), "adaln_zero", 0)
        return Trainer(
            network,
            latents,
            diffusion,
            train,
            label_dropout=model.label_dropout,
            seed=0,
            scratch=scratch / name,
            ended=scratch / "any length",
            settings=settings,
        )

    return build


def resume_from(scratch: Path, *arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["resume-from", *arguments, "--scratch", str(scratch)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def tables(directory: Path) -> dict[str, str]:
    return {name: (directory / f"{name}.csv").read_text() for name in TABLES}


def test_an_unchanged_continuation_is_bit_identical_to_the_run(trainer: Build, scratch: Path, tmp_path: Path) -> None:
    run = trainer(keep_checkpoints=[7])
    run.run("run")
    run.forget()
    (tmp_path / "run").mkdir()
    run.records.write(tmp_path / "run")
    said = resume_from(scratch, "micro-0", "--steps", "5", "--output", str(tmp_path / "continued"))
    assert "carried over: weights; their average (EMA); what was measured so far; the optimiser's state of all" in said
    assert "not carried over" not in said
    assert tables(tmp_path / "continued") == tables(tmp_path / "run")


def test_keeping_checkpoints_changes_nothing_of_a_run(trainer: Build) -> None:
    kept, plain = trainer("kept", keep_checkpoints=[1, 6, "last"]), trainer("plain")
    for run in (kept, plain):
        run.run("run")
        run.forget()
    assert kept.records == plain.records
    assert all(torch.equal(kept.ema.tensors[name], plain.ema.tensors[name]) for name in plain.ema.tensors)
    assert [found.step for found in kept_in(kept.scratch)] == [1, 6]
    assert list(plain.scratch.iterdir()) == []


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(trainer: Build, capsys: Any) -> None:
    run = trainer("short", steps=7, keep_checkpoints=["last"])
    run.run("short")
    run.forget()
    longer, whole = trainer("longer", keep_checkpoints=["last"]), trainer("whole")
    longer.run("longer")
    whole.run("whole")
    assert "longer: resumed at step 7, from the end of a shorter run" in capsys.readouterr().out
    assert longer.records == whole.records
    assert all(torch.equal(longer.ema.tensors[name], whole.ema.tensors[name]) for name in whole.ema.tensors)
    again = trainer("again", keep_checkpoints=["last"])
    again._resume("again")
    assert again.steps_done == 0  # a run of this length is computed, not read


@pytest.mark.parametrize(("schedule", "depends"), [("constant", False), ("linear", True), ("cosine", True), ("wsd", True)])
def test_only_a_decay_makes_early_steps_depend_on_the_length(params: Params, schedule: str, depends: bool) -> None:
    fields = {"constant": {}, "wsd": {"decay_steps": 5, "final_fraction": 0.0}}.get(schedule, {"final_fraction": 0.0})
    section = {"name": schedule, "warmup_steps": 2, **fields}
    train = TrainParams.model_validate(params.train.model_dump() | {"schedule": section})
    rates = [[learning_rate(train.model_copy(update={"steps": steps}), step) for step in range(100)] for steps in (100, 200)]
    assert train.depends_on_length == (rates[0] != rates[1]) == depends


def test_parameters_without_kept_checkpoints_have_the_identity_that_they_had(params: Params) -> None:
    assert "keep_checkpoints" not in params.train.model_dump(mode="json")
    written = params.train.model_dump(mode="json")
    assert TrainParams.model_validate(written) == params.train
    kept = TrainParams.model_validate({**written, "keep_checkpoints": [7, "last"]})
    assert kept.model_dump()["keep_checkpoints"] == (7, "last")
    with pytest.raises(ValidationError, match=r"no checkpoint is due at 350; expected less than steps = 350, or last"):
        TrainParams.model_validate({**written, "keep_checkpoints": [350]})


def test_variants_are_compared_and_say_what_they_carry_over(trainer: Build, scratch: Path, tmp_path: Path) -> None:
    run = trainer(keep_checkpoints=[6, 8])
    run.run("run")
    output = tmp_path / "compared"
    said = resume_from(
        scratch,
        *("micro-0", "--step", "6", "--steps", "4", "--output", str(output), "--set", "train.log_every=1"),
        *("--variant", "betas: train.optimizer.betas=[0.9, 0.95], train.gradient_clip=1.0"),
        *("--variant", "sgd: train.optimizer={name: sgd, momentum: 0.9, nesterov: false, weight_decay: 0.0, groups: []}"),
        *("--variant", "bf16: train.precision=bf16"),
        *("--variant", "luck: seed=1"),
    )
    found = pd.read_csv(output / COMPARISON).set_index("variant")
    assert list(found.index) == ["unchanged", "betas", "sgd", "bf16", "luck"]
    assert set(found["status"]) == {"finished"}
    assert found["mse"].nunique() == 5
    assert (
        "betas: train.optimizer.betas: [0.9, 0.999] -> [0.9, 0.95], train.gradient_clip: null -> 1.0, train.log_every" in said
    )
    assert re.search(r"the optimiser's state of all \d+ weights, which starts empty: adamw left another kind", said)
    assert "computed otherwise: eager bf16 on cpu, the run eager fp32 on cpu" in said
    assert "batches: seed changed, so that they are others" in said
    for name in found.index:
        told = json.loads((output / name / FILE).read_text())
        assert (told["from_step"], told["steps_done"]) == (6, 10)
        assert (output / name / "events.csv").exists()
    logged = pd.read_csv(output / "betas" / "metrics.csv")["step"]
    assert list(logged) == [0, 3, 6, 7, 8, 9]  # the run's own until step 6


def test_a_collapse_can_be_examined_without_having_been_planned(
    trainer: Build, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(loop, "learning_rate", lambda params, step: params.learning_rate * (1 if step < 110 else 15))
    sizes = {"steps": 150, "checkpoint_every": 20, "validate_every": 150, "diagnose_every": 150, "learning_rate": 3e-3}
    run = trainer("doomed", **sizes)
    run.run("doomed")
    run.forget()
    collapse = run.records.collapse
    assert collapse is not None
    (kept,) = kept_in(run.scratch)
    onset = (collapse.spike or collapse).step
    assert onset >= 110
    assert onset - BEFORE - 20 < kept.step <= onset - BEFORE
    assert f"kept the checkpoint of step {kept.step}, before the collapse at step {collapse.step}" in capsys.readouterr().out
    assert sorted(path.name for path in run.scratch.iterdir()) == [KEPT]
    said = resume_from(
        scratch,
        "doomed",
        "--steps",
        "70",
        "--set",
        "train.stop_on_collapse=true",
        "--variant",
        "slow: train.learning_rate=1e-5",
    )
    assert f"unchanged: collapsed at step {collapse.step}: error {collapse.mse:.4f}" in said
    assert f"slow: no collapse until step {kept.step + 70}" in said


def test_only_the_checkpoint_before_a_spike_that_lasts_waits_for_its_collapse(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, None)
    for step in range(10, 210, 10):
        checkpoint.save(tmp_path, {"steps_done": step})
        keeper.saved(step, asked_for=False)
    assert keeper.recent.steps() == [150, 160, 170, 180, 190, 200]  # the first is 48 steps back, beyond the reach of any event
    spike, recovery, collapse = (
        Event(0, step, kind, "loss", 1.0, 0.5)  # type: ignore[arg-type]
        for step, kind in ((198, "spike"), (205, "recovery"), (207, "collapse"))
    )
    assert keeper.judged(spike, 0) == ""
    assert keeper.suspect.steps() == [160]
    keeper.judged(recovery, 0)
    assert keeper.suspect.steps() == []
    keeper.judged(spike, 0)
    assert "kept the checkpoint of step 160, before the collapse at step 207" in keeper.judged(collapse, 1)
    assert keeper.judged(collapse, 2) == ""
    keeper.forget()
    assert keeper.kept.steps() == [160]
    assert not (tmp_path / RECENT).exists()
    assert not (tmp_path / SUSPECT).exists()


ADAMW = {"name": "adamw", "betas": [0.9, 0.99], "weight_decay": 0.0, "groups": []}
MUON = {
    **{"name": "muon", "hidden": "block", "momentum": 0.95, "nesterov": True, "adjust_lr_fn": "original", "groups": []},
    **{"learning_rate_multiplier": 1.0, "weight_decay": 0.1, "betas": [0.9, 0.99], "adamw_weight_decay": 0.1},
}
SGD = {"name": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "groups": []}


def named(name: str, **arguments: object) -> dict[str, Any]:
    return {"name": name, "arguments": arguments, "groups": []}


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        (ADAMW, {**ADAMW, "betas": [0.9, 0.95], "weight_decay": 0.1}, "all"),
        (ADAMW, SGD, "none"),
        (ADAMW, MUON, "some"),
        (MUON, ADAMW, "some"),
        (SGD, {**SGD, "momentum": 0.0}, "none"),
        (SGD, named("SGD", momentum=0.5), "all"),
        (ADAMW, named("AdamW", eps=1e-6), "all"),
        (ADAMW, named("AdamW", amsgrad=True), "none"),
        (ADAMW, named("NAdam"), "none"),
    ],
)
def test_the_state_of_an_optimiser_goes_to_one_that_holds_the_same(
    trainer: Build, before: dict[str, Any], after: dict[str, Any], share: str
) -> None:
    first, second = trainer("first", optimizer=before, steps=2), trainer("second", optimizer=after)
    first.run("first")
    every = {name for name, weight in first.model.named_parameters() if weight.requires_grad}
    names = carried(first.params.optimizer, second.params.optimizer, models.roles(first.model)) & every
    assert {"all": names == every, "none": not names, "some": bool(names) and names < every}[share]
    state = first._state()
    state["optimizer"]["weights"] = {name: state["optimizer"]["weights"][name] for name in names}
    second.restore(state)
    second.last_step = 4
    second.go_on("second")  # torch meets all that it expects
    assert second.divergence is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["other"], "no checkpoint of 'other' is kept in"),
        (["micro-0", "--step", "7"], "no checkpoint of 'micro-0' is kept at step 7; these are:\n  step 3:"),
        (["micro-0"], "several checkpoints of 'micro-0' are kept; give one of these paths, or --step:\n  step 3:"),
        (["micro-0", "--step", "3", "--set", "train.precison=fp32"], "changed: train.precison is not a known key"),
        (
            ["micro-0", "--step", "3", "--set", "evaluate.steps=3"],
            "evaluate.steps is no parameter of a run; expected seed",
        ),
        (["micro-0", "--step", "3", "--set", "fp32"], "'fp32' changes nothing; expected key=value, such as"),
        (
            ["micro-0", "--step", "3", "--variant", "train.precision=fp32"],
            "expected a name and what it changes, such as 'fp32:",
        ),
        (["micro-0", "--step", "3", "--variant", "unchanged: seed=1"], "two variants are called 'unchanged'"),
        (["micro-0", "--step", "3", "--set", "train.backend=fused"], "changed: train.backend = 'fused'"),
        (["micro-0", "--step", "3", "--set", "model.depth=3"], "the checkpoint's weights do not fit this network: blocks.2."),
        (["micro-0", "--step", "3", "--latents", "nowhere"], "nowhere/manifest.json not found"),
        (
            ["micro-0", "--step", "3", "--output", "."],
            "--output . exists: expected a folder that is not there yet, or is empty",
        ),
    ],
)
def test_what_cannot_be_continued_is_one_message(trainer: Build, scratch: Path, arguments: list[str], message: str) -> None:
    trainer(keep_checkpoints=[3, 6], steps=7).run("run")
    assert message in resume_from(scratch, *arguments, code=2)


def test_a_checkpoint_is_found_by_name_by_folder_and_in_the_list(trainer: Build, scratch: Path, tmp_path: Path) -> None:
    trainer(keep_checkpoints=[3, "last"], steps=5).run("run")
    by_name = find("runs/train/micro-0", scratch, 3)
    assert find(str(scratch / "micro-0"), tmp_path, None) == by_name
    assert find(str(by_name.path), tmp_path, None) == by_name
    assert find("micro-0", scratch, 5).path == Shelf(scratch / "any length" / ENDED).path(5)
    listed = resume_from(scratch)
    assert listed.count("micro-0") >= 2
    assert by_name.size in listed


def test_other_latents_are_refused(trainer: Build, scratch: Path, latents: LatentStore, tmp_path: Path) -> None:
    trainer(keep_checkpoints=[3], steps=4).run("run")
    arrays = latents.store.arrays
    other = StoreWriter(tmp_path / "other", **{name: (array.dtype, array.shape[1:]) for name, array in arrays.items()})
    for name, array in arrays.items():
        other.append(name, array[:16])
    other.close(class_names=["a", "b", "c"], num_classes=3, flip=True, normalize=latents.store.meta["normalize"])
    said = resume_from(scratch, "micro-0", "--latents", str(tmp_path / "other"), code=2)
    assert "does not hold the latents that micro-0 was trained on; give the folder that does: --latents FOLDER" in said

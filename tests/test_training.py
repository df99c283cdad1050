"""Training repeats exactly: from the start, from a checkpoint, and with the same randomness for every strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from dit import checkpoint, init
from dit.config import Params
from dit.data.batches import Batches, epoch_order
from dit.data.latents import LatentStore
from dit.diffusion import Diffusion
from dit.models.dit.network import DiT
from dit.sections import TrainParams
from dit.training.loop import Trainer
from pipelines.files import complete_directory

Build = Callable[..., Trainer]


@pytest.fixture
def trainer(params: Params, latents: LatentStore, micro: Callable[..., DiT], tmp_path: Path) -> Build:
    """Builds a run of 12 steps on the small latents."""
    validation = params.train.validation.model_copy(update={"samples": 20})
    short = {"steps": 12, "batch_size": 8, "log_every": 3, "validate_every": 6, "checkpoint_every": 5, "diagnose_every": 6}

    def build(strategy: str = "adaln_zero", seed: int = 0, scratch: str = "scratch", **changes: object) -> Trainer:
        settings = params.train.model_copy(update={"validation": validation, **short, **changes})
        network = init.apply(micro(), strategy, seed)
        diffusion = Diffusion(params.diffusion)
        return Trainer(network, latents, diffusion, settings, label_dropout=0.1, seed=seed, scratch=tmp_path / scratch)

    return build


def test_a_run_repeats_bit_for_bit(trainer: Build) -> None:
    first, second = trainer(scratch="a"), trainer(scratch="b")
    first.run("first")
    second.run("second")
    assert first.records == second.records
    assert all(torch.equal(first.ema.tensors[name], second.ema.tensors[name]) for name in first.ema.tensors)


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("killed_at", [3, 7, 11])
def test_a_killed_run_resumes_and_ends_bit_identical(trainer: Build, monkeypatch: pytest.MonkeyPatch, killed_at: int) -> None:
    killed_and_resumed(trainer, monkeypatch, killed_at)


GROUPS = [{"role": "final", "learning_rate_multiplier": 0.5, "weight_decay_multiplier": 2.0}]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "betas": [0.9, 0.99], "weight_decay": 0.1},
    "sgd": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "muon": {
        "name": "muon",
        "hidden": "block",
        "momentum": 0.95,
        "nesterov": True,
        "adjust_lr_fn": "match_rms_adamw",
        "learning_rate_multiplier": 1.0,
        "weight_decay": 0.1,
        "betas": [0.9, 0.99],
        "adamw_weight_decay": 0.1,
    },
    "RAdam": {"name": "RAdam", "arguments": {"weight_decay": 0.1}},
    "NAdam": {"name": "NAdam", "arguments": {}},
    "Adafactor": {"name": "Adafactor", "arguments": {}},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_exactly_with_every_optimiser_and_a_schedule(
    trainer: Build, params: Params, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    section = {"optimizer": OPTIMIZERS[name] | {"groups": GROUPS}, "learning_rate": 1e-2}
    section["schedule"] = {"name": "wsd", "warmup_steps": 2, "decay_steps": 4, "final_fraction": 0.1}
    chosen = TrainParams.model_validate(params.train.model_dump() | section)
    made = {key: getattr(chosen, key) for key in section}
    whole = killed_and_resumed(trainer, monkeypatch, 7, **made)
    assert [row["learning_rate"] for row in whole.records.metrics] == pytest.approx([5e-3, 1e-2, 1e-2, 7.75e-3])
    assert whole.records.validation[-1]["mse"] < whole.records.validation[0]["mse"]


def killed_and_resumed(trainer: Build, monkeypatch: pytest.MonkeyPatch, killed_at: int, **changes: object) -> Trainer:
    """A whole run, after the assertion that a run which was killed at a step ends as it does."""
    whole = trainer(scratch="whole", **changes)
    whole.run("whole")
    interrupted = trainer(**changes)
    train = interrupted._train

    def train_until_killed(step: int) -> None:
        if step == killed_at:
            raise KilledError
        train(step)

    monkeypatch.setattr(interrupted, "_train", train_until_killed)
    with pytest.raises(KilledError):
        interrupted.run("interrupted")
    resumed = trainer(**changes)
    resumed.run("resumed")
    assert resumed.records == whole.records
    assert all(torch.equal(whole.ema.tensors[name], resumed.ema.tensors[name]) for name in whole.ema.tensors)
    return whole


@pytest.mark.parametrize(("damaged", "resumed_at"), [(["checkpoint.pt"], 4), (["checkpoint.pt", "checkpoint.before.pt"], 0)])
def test_a_run_whose_checkpoint_is_damaged_goes_on_from_an_earlier_one_and_ends_bit_identical(
    trainer: Build, capsys: pytest.CaptureFixture[str], damaged: list[str], resumed_at: int
) -> None:
    whole, interrupted, resumed = (trainer(scratch=name, checkpoint_every=4) for name in ("whole", "scratch", "scratch"))
    whole.run("whole")
    interrupted.run("interrupted")
    for name in damaged:
        with (interrupted.scratch / name).open("r+b") as file:
            file.seek(-2000, 2)
            byte = file.read(1)[0]
            file.seek(-2000, 2)
            file.write(bytes([byte ^ 1]))
    capsys.readouterr()
    resumed.run("resumed")
    said = capsys.readouterr().out
    assert all(f"{interrupted.scratch / name} is damaged: its bytes are not those that were saved" in said for name in damaged)
    assert (f"resumed at step {resumed_at}" in said) is (resumed_at > 0)
    assert sorted(path.name for path in interrupted.scratch.glob("*.damaged")) == sorted(f"{name}.damaged" for name in damaged)
    assert resumed.records == whole.records
    assert all(torch.equal(whole.ema.tensors[name], resumed.ema.tensors[name]) for name in whole.ema.tensors)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_damage_to_a_checkpoint_goes_unnoticed(data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        directory, state = Path(name), {"weights": torch.arange(100.0), "step": 3}
        checkpoint.save(directory, state)
        file = directory / checkpoint.FILE
        written = file.read_bytes()
        where = data.draw(st.integers(0, len(written) - 1))
        if data.draw(st.booleans(), label="cut off"):
            file.write_bytes(written[:where])
        else:
            flipped = written[where] ^ (1 << data.draw(st.integers(0, 7)))
            file.write_bytes(written[:where] + bytes([flipped]) + written[where + 1 :])
        assert checkpoint.load(directory, torch.device("cpu")) is None


def test_an_ended_run_leaves_no_checkpoint_so_that_a_forced_rerun_computes(trainer: Build) -> None:
    run = trainer()
    run.run("run")
    run.forget()
    assert checkpoint.load(run.scratch, torch.device("cpu")) is None


def test_strategies_of_one_seed_see_the_same_batches_in_any_order(params: Params, latents: LatentStore) -> None:
    def batches(seed: int) -> Batches:
        return Batches(latents, Diffusion(params.diffusion), batch_size=8, label_dropout=0.5, seed=seed)

    forwards = [batches(0)(step) for step in range(4)]
    again = batches(0)
    backwards = [again(step) for step in reversed(range(4))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert all(torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one))
    assert not torch.equal(forwards[0].eps, forwards[1].eps)
    assert not torch.equal(forwards[0].eps, batches(1)(0).eps)
    assert latents.num_classes in torch.cat([batch.labels for batch in forwards])


@settings(deadline=None)
@given(seed=st.integers(0, 100), count=st.integers(1, 50), length=st.integers(1, 60), steps=st.integers(1, 6))
def test_every_epoch_visits_every_sample_once(seed: int, count: int, length: int, steps: int) -> None:
    stream = torch.cat([epoch_order(seed, count, step * length, length) for step in range(steps)])
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


def test_a_zero_head_starts_at_the_targets_second_moment_and_a_random_head_above(trainer: Build) -> None:
    start = {}
    for strategy in ("adaln_zero", "head_xavier"):
        run = trainer(strategy, scratch=strategy, steps=1)
        run.run(strategy)
        start[strategy] = run.records.validation[0]["mse"]
    assert start["adaln_zero"] == pytest.approx(run.validation.target_second_moment, rel=1e-6)
    assert start["head_xavier"] > 1.5 * start["adaln_zero"]


def test_the_published_network_wakes_up_in_three_steps(trainer: Build) -> None:
    run = trainer(steps=3, diagnose_every=1)
    run.run("run")
    asleep = {(row["step"], row["role"]) for row in run.records.diagnostics if row["zero_gradient_fraction"] == 1}
    roles = {row["role"] for row in run.records.diagnostics}
    awake = [{role for role in roles if (step, role) not in asleep} for step in range(3)]
    head = {role for role in roles if "final.projection" in role}
    second = {role for role in roles if "final.modulation" in role or ".gate" in role or "patch_embed" in role}
    assert awake[0] == head
    assert awake[1] == head | second
    assert awake[2] == roles


def test_validation_falls_and_is_told_by_timestep_bucket(trainer: Build) -> None:
    run = trainer(steps=60, validate_every=30)
    run.run("run")
    rows = [row for row in run.records.validation if row["weights"] == "model"]
    assert [row["step"] for row in rows] == [0, 1, 2, 4, 8, 16, 30, 60]
    assert rows[-1]["mse"] < 0.7 * rows[0]["mse"]
    buckets = [rows[-1][f"mse_t{index}"] for index in range(5)]
    assert sum(buckets) / 5 == pytest.approx(rows[-1]["mse"])


def test_a_diverging_run_is_a_result_that_names_the_step(trainer: Build) -> None:
    run = trainer(learning_rate=1e30)
    run.run("run")
    assert run.divergence is not None
    assert 1 <= run.divergence.step <= 3
    assert run.steps_done < 12


def test_hidden_units_that_start_equal_stay_equal_and_others_stay_distinct(trainer: Build) -> None:
    for strategy, expected in (("symmetric", 1), ("adaln_zero", 256)):
        run = trainer(strategy, scratch=strategy)
        run.run(strategy)
        assert run.model.blocks[0].mlp.fc1.weight.grad.any()
        units = {row["distinct_units"] for row in run.records.diagnostics if row["role"] == "block[0].mlp_in.weight"}
        assert units == {expected}


def test_an_output_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(name: str, error: type[Exception] | None = None) -> None:
        with complete_directory(tmp_path / "out") as out:
            (out / name).touch()
            if error:
                raise error

    for name in ("first", "second"):
        write(name)
    with pytest.raises(KilledError):
        write("third", KilledError)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/checksums.json",
        "out/second",
    ]

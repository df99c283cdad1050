"""The Python API: arrays to an answer in a few lines, by the code of the studies, with one clear message for a slip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from studies import MICRO, run_stage

import dit
from dit import config
from dit.data.latents import LatentStore
from dit.errors import UserError
from pipelines import design

SHORT = {"train.validation.samples": 16, "train.log_every": 5, "train.validate_every": 5, "train.diagnose_every": 10}


def short(latents: LatentStore, seed: int = 0, strategy: str = "adaln_zero") -> dit.Run:
    return dit.train("DiT-Micro/2", latents, strategy=strategy, seed=seed, steps=10, batch_size=8, settings=SHORT)


@pytest.fixture(scope="module")
def run(latents: LatentStore) -> dit.Run:
    return short(latents)


def arrays(latents: LatentStore, split: str) -> tuple[np.ndarray, np.ndarray]:
    found = latents.split(split)  # type: ignore[arg-type]
    return np.array(found.mean[:, 0]), np.array(found.labels)


def test_importing_dit_is_cheap() -> None:
    code = "import sys, dit; sys.exit(bool({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_are_bit_identical_to_those_of_a_run_of_a_study(
    latents_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**MICRO, "images.size": 32, "train.steps": 10, "autoencoder.channels": [16, 32, 64]}
    params = config.load(config.shipped()).with_values(changes)
    monkeypatch.chdir(tmp_path)
    design.write(tmp_path, params)
    folder = tmp_path / design.item_named(params, "train", "symmetric-1").inputs["latents"]
    folder.parent.mkdir(parents=True)
    folder.symlink_to(latents_directory)
    from pipelines.stages.train import train

    run_stage(train, params, "symmetric-1")
    own = {key: value for key, value in changes.items() if key.startswith("train.")}
    ran = dit.train("DiT-Micro/2", LatentStore(latents_directory), strategy="symmetric", seed=1, settings=own)
    expected = load_file(next(tmp_path.glob("runs/train/symmetric-1/ema.safetensors")))
    assert expected.keys() == ran.model.network.state_dict().keys()
    assert all(torch.equal(expected[name], weight) for name, weight in ran.model.network.state_dict().items())


def test_arrays_tensors_and_data_sets_give_the_same_run(latents: LatentStore) -> None:
    z, y = arrays(latents, "train")
    held = arrays(latents, "validation")
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(z), torch.from_numpy(y))
    given = ((z, y), (torch.from_numpy(z), torch.from_numpy(y)), (pairs, None))
    runs = [
        dit.train("DiT-Micro/2", a, b, validation=held, steps=2, batch_size=8, settings=SHORT)  # type: ignore[arg-type]
        for a, b in given
    ]
    assert all(run.history.equals(runs[0].history) for run in runs)


def test_samples_have_the_units_of_the_latents(run: dit.Run) -> None:
    described = run.model.config.model_copy(update={"shift": (50.0,) * 4, "scale": (0.01,) * 4})
    normalised = dit.sample(run.model, labels=[0, 1, 2], steps=2, guidance_scale=2.0)
    drawn = dit.sample(dit.Model(run.model.network, described), labels=[0, 1, 2], steps=2, guidance_scale=2.0)
    assert drawn.shape == (3, 4, 8, 8)
    assert torch.allclose(drawn, 100 * normalised + 50)


def test_a_run_leaves_torch_as_it_was(latents: LatentStore) -> None:
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        short(latents)
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode(before)


def test_a_run_has_its_history(run: dit.Run) -> None:
    assert list(run.history["step"]) == [0, 1, 2, 4, 5, 10]
    assert run.history["validation_mse"].iloc[0] == pytest.approx(1, abs=0.2)
    assert run.outcome.status == "finished"
    assert not run.diagnostics.empty


def test_a_saved_model_samples_the_same(run: dit.Run, tmp_path: Path) -> None:
    run.model.save_pretrained(tmp_path)
    again = dit.Model.from_pretrained(tmp_path)
    assert torch.equal(dit.sample(again, [0, 1], steps=2), dit.sample(run.model, [0, 1], steps=2))


def test_an_audit_tells_that_a_trained_network_is_not_at_its_start(run: dit.Run) -> None:
    assert dit.audit_model(run.model).failures("adaln-zero")


def test_a_comparison_is_that_of_the_studies(latents: LatentStore, run: dit.Run) -> None:
    runs = {"zero": [run, short(latents, 1), short(latents, 2)]}
    runs["xavier"] = [short(latents, seed, "head_xavier") for seed in range(3)]
    answer = dit.compare(runs)
    assert "xavier is" in str(answer)
    assert "worse than zero" in str(answer)
    assert list(answer.table["strategy"]) == ["zero", "xavier"]


Z, Y = np.random.default_rng(0).standard_normal((60, 4, 8, 8)).astype(np.float32), np.arange(60) % 3
WRONG = [
    ({"latents": Z[0]}, "latents of shape (4, 8, 8): expected (N, C, H, W)"),
    ({"latents": Z[:, :, :6]}, "with H = W"),
    ({"latents": Z[:, :, :7, :7]}, "patch size 2 does not divide the latent size 7"),
    ({"latents": Z * np.float32(np.nan)}, "not finite"),
    ({"labels": Y[:-1]}, "one whole number for each of 60 latents"),
    ({"labels": Y - 1}, "the smallest is -1; expected classes from 0"),
    ({"labels": Y / 2}, "type float64"),
    ({"labels": None}, "labels are missing"),
    ({"num_classes": 2}, "num_classes = 2 allows 0 to 1"),
    ({"strategy": "adalnzero"}, "did you mean adaln_zero"),
    ({"model": "DiT-Micr/2"}, "unknown model 'DiT-Micr/2'"),
    ({"steps": 0}, "train.steps = 0"),
    ({"seed": 1.5}, "seed = 1.5: expected a whole number"),
    ({"settings": {"train.lerning_rate": 1e-3}}, "did you mean train.learning_rate"),
    ({"settings": {"trian.steps": 10}}, "did you mean train.steps"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_one_message(changes: dict, message: str) -> None:
    given = {"model": "DiT-Micro/2", "latents": Z, "labels": Y, **changes}
    with pytest.raises(UserError) as raised:
        dit.train(**given)
    assert message in str(raised.value)

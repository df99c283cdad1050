"""Several processes take the steps of one, resume what another number of them began, and fail as one. On CPUs, through gloo."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from studies import ONE_SETTING

from dit import config, init
from dit.data.images import ImageStore
from dit.data.latents import LatentStore, write_latents
from dit.diffusion import Diffusion
from dit.distributed import Ranks
from dit.errors import ConfigError
from dit.models import build
from dit.sampling import sample
from dit.training.loop import Trainer
from pipelines import design
from pipelines.files import write_json
from pipelines.overrides import override

ROOT = Path(__file__).parents[1]
STEPS = 24
SMALL = {
    **ONE_SETTING,
    "model.name": "DiT-Micro/2",
    "train.device": "cpu",
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.log_every": 4,
    "train.validate_every": STEPS,
    "train.checkpoint_every": 2,
    "train.gradient_clip": 1.0,
    "train.validation.samples": 16,
}

FORKS = torch.multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["dit.data.latents", "dit.sampling", "dit.training.loop"])


def on_two_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Run `function` in two processes, which are given their rank and then `arguments`."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")


@pytest.fixture
def workspace(tmp_path: Path, latents_directory: Path) -> Path:
    """A folder with latents and what a stage reads; the working directory stays."""
    return furnished(tmp_path, latents_directory)


def furnished(folder: Path, latents_directory: Path) -> Path:
    shutil.copytree(latents_directory, folder / "data" / "latents")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, latents_directory: Path) -> Path:
    """The workspace of a run on one process."""
    folder = furnished(tmp_path_factory.mktemp("alone"), latents_directory)
    finished(train(folder, 1))
    return folder


def train(
    workspace: Path, processes: int, parallel: str = "ddp", changes: Mapping[str, Any] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start stage `train` on so many processes."""
    given = {**SMALL, "train.processes": processes, "train.parallel": parallel, **(changes or {})}
    (workspace / "params.yaml").write_text(override((ROOT / "params.yaml").read_text(), given))
    write_identity(workspace)
    command = [sys.executable, "-m", "pipelines.stages.train", "adaln_zero-0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, cwd=workspace, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def write_identity(workspace: Path) -> None:
    """What stage `design` writes for the run, where the parameters are right."""
    with suppress(ConfigError):
        params = config.load(workspace / "params.yaml")
        item = design.item_named(params, "train", "adaln_zero-0")
        (workspace / item.identity_file).parent.mkdir(parents=True, exist_ok=True)
        write_json(workspace / item.identity_file, design.identity(params, item))


def refused(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    return output


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(workspace: Path) -> np.ndarray:
    """Training and validation errors of the run, and the norms of its gradients."""
    directory = workspace / "runs" / "train" / "adaln_zero-0"
    metrics, validation = (pd.read_csv(directory / f"{name}.csv") for name in ("metrics", "validation"))
    return np.concatenate([metrics["mse"], metrics["gradient_norm"], validation["mse"]])


def diagnoses(workspace: Path) -> list[pd.DataFrame]:
    directory = workspace / "runs" / "train" / "adaln_zero-0"
    tables = ("diagnostics", "gradient_noise", "stability")
    roles, noise, blocks = (pd.read_csv(directory / f"{name}.csv") for name in tables)
    return [roles[~roles["role"].str.endswith("key.bias")], noise, blocks]  # whose gradient is zero but for rounding


@pytest.mark.parametrize(("processes", "parallel"), [(4, "ddp"), (2, "fsdp")])
def test_any_number_of_processes_takes_the_steps_of_one(workspace: Path, alone: Path, processes: int, parallel: str) -> None:
    output = finished(train(workspace, processes, parallel))
    assert output.count("validation mse") == 1  # one rank reports
    np.testing.assert_allclose(losses(workspace), losses(alone), rtol=1e-5)
    for found, expected in zip(diagnoses(workspace), diagnoses(alone), strict=True):
        assert list(found.columns) == list(expected.columns)
        if parallel == "ddp":  # weights that are sharded are not diagnosed
            np.testing.assert_allclose(found.select_dtypes("number"), expected.select_dtypes("number"), rtol=1e-3, atol=1e-5)


def test_muon_takes_the_same_steps_on_sharded_weights_up_to_the_rounding_of_bf16(workspace: Path) -> None:
    muon = {
        "name": "muon",
        "hidden": "block",
        "momentum": 0.95,
        "nesterov": True,
        "adjust_lr_fn": "match_rms_adamw",
        "learning_rate_multiplier": 1.0,
        "weight_decay": 0.1,
        "betas": [0.9, 0.999],
        "adamw_weight_decay": 0.0,
        "groups": [{"role": "modulation", "learning_rate_multiplier": 0.5}],
    }
    found = []
    for processes, parallel in ((1, "ddp"), (2, "fsdp")):
        finished(train(workspace, processes, parallel, {"train.optimizer": muon}))
        found.append(losses(workspace))
    np.testing.assert_allclose(*found, rtol=1e-2)


def test_a_killed_process_ends_the_stage_and_the_next_run_may_shard_the_weights(workspace: Path, alone: Path) -> None:
    begun = train(workspace, 2)
    os.kill(ranks_after_a_checkpoint(begun, workspace)[-1].pid, signal.SIGKILL)
    output, _ = begun.communicate(timeout=300)
    assert begun.returncode == os.EX_TEMPFAIL, output
    assert "was killed by SIGKILL; the others were ended, and no output was written" in output
    assert not (workspace / "runs" / "train").exists()
    assert "resumed at step" in finished(train(workspace, 2, "fsdp"))
    np.testing.assert_allclose(losses(workspace), losses(alone), rtol=1e-5)


def ranks_after_a_checkpoint(process: subprocess.Popen[str], workspace: Path) -> list[psutil.Process]:
    deadline = time.monotonic() + 300
    while not list(workspace.glob(".scratch/*/checkpoint.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    return psutil.Process(process.pid).children()


@pytest.mark.parametrize(
    ("signal_of", "code", "processes"), [(signal.SIGKILL, -signal.SIGKILL, 2), (signal.SIGTERM, os.EX_TEMPFAIL, 1)]
)
def test_ranks_end_with_their_launcher_and_any_number_of_them_goes_on(
    workspace: Path, alone: Path, signal_of: signal.Signals, code: int, processes: int
) -> None:
    begun = train(workspace, 2, TMPDIR=str(workspace))
    ranks = ranks_after_a_checkpoint(begun, workspace)
    assert len(ranks) == 2
    open_to = {each.laddr.ip for each in ranks[0].net_connections() if each.status == psutil.CONN_LISTEN}
    begun.send_signal(signal_of)
    assert open_to <= {"127.0.0.1", "::1"}
    output, _ = begun.communicate(timeout=300)
    assert begun.returncode == code, output
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
    assert not (workspace / "runs" / "train").exists()
    assert not list(workspace.glob("torchelastic*"))
    assert "resumed at step" in finished(train(workspace, processes))
    np.testing.assert_allclose(losses(workspace), losses(alone), rtol=1e-5)


def test_hosts_that_do_not_share_their_checkpoints_are_refused(tmp_path: Path, latents_directory: Path) -> None:
    on_two_ranks(resume_apart, tmp_path, latents_directory)


def resume_apart(rank: int, directory: Path, latents_directory: Path) -> None:
    """One rank, whose scratch folder is its own; the first alone writes a checkpoint."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=2)
    ranks = Ranks(torch.device("cpu"), rank, 2, grouped=True)
    params = config.load(ROOT / "params.yaml")
    torch.manual_seed(rank)
    network = build("DiT-Micro/2", latent_size=8, latent_channels=4, num_classes=3, learn_sigma=True)
    diffusion, store = Diffusion(params.diffusion), LatentStore(latents_directory)
    run = Trainer(
        network, store, diffusion, params.train, label_dropout=0.1, seed=0, scratch=directory / f"{rank}", ranks=ranks
    )
    assert not any(ranks.gather(weight.detach().sum()[None], 2).diff() for weight in network.parameters())  # the first one's
    run.steps_done = 2
    run._save()
    with pytest.raises(ConfigError, match=r"different steps, \[0, 2\]; all hosts must share the folder of checkpoints"):
        run._resume("run")


def test_a_wrong_number_of_processes_is_one_error_before_any_work(workspace: Path) -> None:
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    expected = "error: train.processes = 1, but torchrun started 2 processes\n"
    assert refused(train(workspace, 1, **group)) == expected
    assert not (workspace / ".scratch").exists()
    command = [sys.executable, "-m", "pipelines.stages.features"]
    features = subprocess.run(
        command,
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(ROOT), **group},
        capture_output=True,
        text=True,
        check=False,
    )
    assert features.stderr == "error: WORLD_SIZE = 2: this stage is one process; start it without torchrun\n"


def test_rows_are_shared_without_gap_or_overlap() -> None:
    for count in range(9):
        for size in (1, 2, 3, 5):
            own = [Ranks(torch.device("cpu"), rank, size).local_slice(count) for rank in range(size)]
            assert [row for part in own for row in range(count)[part]] == list(range(count))


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size = 8 over 3 processes: expected a multiple of 3"):
        Ranks(torch.device("cpu"), 0, 3).per_rank(8, "train.batch_size")


def test_samples_and_latents_are_those_of_one_process(tmp_path: Path) -> None:
    sample_and_encode(0, 1, tmp_path)
    on_two_ranks(sample_and_encode, 2, tmp_path)
    alone, together = (tmp_path / "1", tmp_path / "2")
    torch.testing.assert_close(torch.load(alone / "samples.pt"), torch.load(together / "samples.pt"), rtol=1e-4, atol=1e-5)
    for file in sorted((alone / "latents").glob("*.bin")):
        assert file.read_bytes() == (together / "latents" / file.name).read_bytes()


def sample_and_encode(rank: int, size: int, directory: Path) -> None:
    """The work of one rank: 8 samples, then 12 and 7 images, of which the last batch is not shared equally."""
    device, out = torch.device("cpu"), directory / str(size)
    torch.set_num_threads(1)
    out.mkdir(exist_ok=True)
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=size)
    ranks = Ranks(device, rank, size, grouped=size > 1)
    params = config.load(ROOT / "params.yaml")
    network = build("DiT-Micro/2", latent_size=4, latent_channels=3, num_classes=3, learn_sigma=True)
    init.apply(network, "torch_default", 0)
    sampler = params.evaluate.model_copy(update={"scheduler": "ddpm", "steps": 3, "batch_size": 4 // size + 1})
    labels = torch.arange(8) % 3
    samples = sample(
        network,
        params.diffusion,
        labels,
        sampler,
        device=device,
        precision=torch.float32,
        description="sample",
        ranks=ranks,
    )
    settings = params.latents.model_copy(update={"batch_size": 2})
    pixels = np.random.default_rng(0).integers(0, 256, (19, 8, 8, 3), np.uint8)
    images = ImageStore(pixels[:12], np.arange(12) % 3, pixels[12:], np.arange(7) % 3, ["a", "b", "c"], {})
    write_latents(images, shades, settings, out / "latents" if ranks.is_main else None, ranks)
    if ranks.is_main:
        torch.save(samples, out / "samples.pt")


def shades(pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in encoder: every other pixel, and a spread of one tenth of its size."""
    mean = torch.from_numpy(pixels[:, ::2, ::2].astype(np.float32)).permute(0, 3, 1, 2)
    return mean, mean / 10 + 1

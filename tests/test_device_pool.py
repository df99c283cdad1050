"""Where a study's stages run: how many at once, and which GPUs each has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit.config import Params
from pipelines.device_pool import DevicePool, advice, device_pool, environment


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def with_processes(params: Params, **processes: int) -> Params:
    update = {name: getattr(params, name).model_copy(update={"processes": count}) for name, count in processes.items()}
    return params.model_copy(update=update)


def taken(pool: DevicePool, *stages: str) -> list[str | None]:
    found = [pool.acquire(stage) for stage in stages]
    return [None if gpus is None else environment(gpus).get("CUDA_VISIBLE_DEVICES", "") for gpus in found]


@pytest.mark.usefixtures("eight_gpus")
def test_each_stage_has_as_many_gpus_as_it_has_processes(params: Params) -> None:
    pool = device_pool(with_processes(params, latents=8, train=1, evaluate=2), None)
    assert taken(pool, "latents", "train@a-0") == ["0,1,2,3,4,5,6,7", None]
    pool.release(list("01234567"))
    assert taken(pool, "train@a-0", "evaluate@b-0", "analyse@a", "evaluate@c-0") == ["0", "1,2", "3", "4,5"]
    assert taken(pool, "evaluate@d-0", "evaluate@e-0", "train@a-1") == ["6,7", None, None]


@pytest.mark.usefixtures("eight_gpus")
def test_more_workers_than_gpus_share_them_evenly_and_fewer_leave_a_stage_all_that_it_wants(params: Params) -> None:
    pool = device_pool(params, 20)
    found = taken(pool, *(f"train@a-{seed}" for seed in range(21)))
    assert sorted(found[:20]) == sorted(str(index % 8) for index in range(20))
    assert found[20] is None
    assert taken(device_pool(with_processes(params, train=4), 1), "train@a-0", "train@a-1") == ["0,1,2,3", None]


@pytest.mark.usefixtures("eight_gpus")
def test_gpus_that_may_not_be_seen_are_not_given_out(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    pool = device_pool(with_processes(params, train=4), None)
    assert taken(pool, "train@a-0", "analyse@a") == ["3,5", None]  # the stage itself says that four are two too many


def test_without_gpus_the_cores_decide(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    busy = params.model_copy(update={"train": params.train.model_copy(update={"device": "cpu", "threads": 2})})
    pool = device_pool(with_processes(busy, latents=4), None)
    assert taken(pool, "latents", "train@a-0", "train@a-1", "train@a-2") == ["", "", "", None]


@pytest.mark.usefixtures("eight_gpus")
def test_a_study_whose_stages_share_gpus_is_told_of_the_multi_process_service_unless_it_runs(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert advice(device_pool(params, 8)) is None
    assert "nvidia-cuda-mps-control -d" in (advice(device_pool(params, 9)) or "")
    (tmp_path / "control").touch()
    assert advice(device_pool(params, 9)) is None


def test_stages_that_share_a_cpu_are_told_nothing_of_gpus(params: Params) -> None:
    assert advice(device_pool(params, 4)) is None

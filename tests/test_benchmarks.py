"""Benchmarks run with the code of today. On a GPU they take minutes, so this runs small ones on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from studies import ROOT

CASE = ("DiT-Micro/2", 8, 8)
STEPS = 8


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the benchmark of training."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train

    return train


def test_training_is_measured_step_by_step_and_by_kernels(benchmark: ModuleType, tmp_path: Path) -> None:
    import measuring

    cpu = torch.device("cpu")
    found = benchmark.measure(measuring.Case(*CASE), "eager", STEPS, cpu, profile=False)
    assert found["images_per_second"] > 0
    assert found["seconds_to_first_step"] > 0
    trainer = benchmark.build(
        CASE[0], CASE[1], measuring.random_latents(tmp_path / "latents", 8), "eager", cpu, tmp_path, steps=STEPS
    )
    before = [weight.clone() for weight in trainer.model.parameters()]
    benchmark.train_three(trainer)
    assert any(not torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))


def test_runs_that_share_a_device_are_measured_at_the_same_time(benchmark: ModuleType, tmp_path: Path) -> None:
    import measuring
    import sharing

    measuring.random_latents(tmp_path / "latents", 8)
    rates = sharing.together(2, measuring.Case(*CASE), STEPS, tmp_path, depth=1)
    assert len(rates) == 2
    assert min(rates) > 0

"""SiT is the published network, called as every network here: its names, its time, its sign, and its dropped channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from dit import config, init, models, yamlfile
from dit.config import Params
from dit.diffusion import Batch, Diffusion
from dit.errors import ConfigError
from dit.models.dit.network import DiT
from dit.models.sit.network import SiT
from dit.sampling import sample

SIZES: dict[str, Any] = {"latent_size": 8, "latent_channels": 4, "num_classes": 3, "learn_sigma": False}


@pytest.fixture
def sit() -> SiT:
    """A tiny SiT with random weights everywhere, in float64."""
    return init.apply(
        models.build("SiT-Micro/2", **SIZES), {"rules": [{"role": "all", "init": "normal", "std": 0.2}]}, 0
    ).double()


def published(network: SiT, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
    """Data - noise at `time` in [0, 1], data at 1: a DiT whose timestep is that time, and the first half of its channels."""
    plain = DiT(
        latent_size=8, patch_size=2, latent_channels=4, hidden_size=64, depth=2, num_heads=2, num_classes=3, learn_sigma=True
    ).double()
    plain.load_state_dict(network.state_dict(), strict=True)
    return plain(x, time, y).chunk(2, dim=1)[0]


def test_a_published_checkpoint_has_the_names_and_shapes_of_a_dit_with_sigma() -> None:
    with torch.device("meta"):
        sit = models.build("SiT-XL/2", latent_size=32, latent_channels=4, num_classes=1000, learn_sigma=False)
        dit = models.build("DiT-XL/2", latent_size=32, latent_channels=4, num_classes=1000, learn_sigma=True)
        without = models.build("SiT-S/2", **SIZES, sigma_head=False)
    assert {name: w.shape for name, w in sit.state_dict().items()} == {name: w.shape for name, w in dit.state_dict().items()}
    assert without.final_layer.linear.out_features == 2 * 2 * 4


def test_the_output_is_noise_minus_data_at_a_time_that_runs_from_noise_to_data(sit: SiT) -> None:
    x, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([0, 2, 3])
    t = torch.tensor([0.0, 250.0, 999.0], dtype=torch.float64)
    expected = -published(sit, x, torch.tensor([1.0, 0.75, 0.001], dtype=torch.float64), y)
    torch.testing.assert_close(sit(x, t, y), expected, rtol=1e-6, atol=1e-6)  # features are those of float32 times


def test_a_loss_is_the_published_one(sit: SiT, params: Params) -> None:
    """|model(x_t, t) - (data - noise)|^2 with x_t = t * data + (1 - t) * noise: willisma/SiT `Transport.training_losses`."""
    diffusion = Diffusion(params.diffusion.model_copy(update={"objective": "flow", "learn_sigma": False}))
    data, noise = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    s, y = torch.rand(5, dtype=torch.float64), torch.randint(3, (5,))
    time = (1 - s).view(-1, 1, 1, 1)
    velocity = published(sit, time * data + (1 - time) * noise, 1 - s, y)
    expected = (velocity - (data - noise)).square().flatten(1).mean(1)
    found = diffusion.training_loss(sit, Batch(data, noise, 1000 * s, y))
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scheduler", "steps"), [("flow_euler", 5), ("flow_heun", 3)])
def test_sampling_integrates_the_published_velocity_from_noise_to_data(
    sit: SiT, params: Params, scheduler: str, steps: int
) -> None:
    diffusion = params.diffusion.model_copy(update={"objective": "flow", "learn_sigma": False})
    settings = params.evaluate.model_copy(
        update={"scheduler": scheduler, "steps": steps, "guidance_scale": 1.0, "batch_size": 2}
    )
    labels = torch.tensor([0, 2])
    network = sit.float()
    start: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, arguments: start.append(arguments[0].clone()))
    drawn = sample(
        network, diffusion, labels, settings, device=torch.device("cpu"), precision=torch.float32, description="sample"
    )
    x, h = start[0].double(), 1 / steps
    for index in range(steps):
        time = torch.full((2,), index * h, dtype=torch.float64)
        first = published(network, x, time, labels)
        if scheduler == "flow_heun" and index < steps - 1:
            first = (first + published(network, x + h * first, time + h, labels)) / 2
        x = x + h * first
    torch.testing.assert_close(drawn.double(), x, rtol=1e-3, atol=1e-3)


def test_training_goes_on_from_a_checkpoint_and_leaves_the_dropped_channels_alone(sit: SiT, params: Params) -> None:
    network, checkpoint = models.build("SiT-Micro/2", **SIZES), {name: w.float() for name, w in sit.state_dict().items()}
    network.load_state_dict(checkpoint, strict=True)
    diffusion = Diffusion(params.diffusion.model_copy(update={"objective": "flow", "learn_sigma": False}))
    data, noise = torch.randn(2, 16, 4, 8, 8)
    batch = Batch(data, noise, 1000 * torch.rand(16), torch.randint(3, (16,)))
    optimiser, losses = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0), []
    for _ in range(5):
        loss = diffusion.training_loss(network, batch).total.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    head, before = (w["final_layer.linear.weight"].unflatten(0, (4, 8)) for w in (network.state_dict(), checkpoint))
    assert torch.equal(head[:, 4:], before[:, 4:])
    assert not torch.equal(head[:, :4], before[:, :4])


@pytest.mark.parametrize("name", ["SiT-S/2", "LightningDiT-S/2"])
def test_what_does_not_fit_a_velocity_is_refused_in_words(name: str) -> None:
    data = yamlfile.read(ROOT / "params.yaml")
    data["model"]["name"] = name
    with pytest.raises(ConfigError, match=rf"diffusion.objective = 'eps' does not fit model.name = '{name}': expected flow"):
        config.parse(data)
    data["diffusion"] |= {"objective": "flow", "learn_sigma": False, "num_timesteps": 500}
    data["evaluate"] |= {"scheduler": "flow_euler"}
    with pytest.raises(ConfigError, match=r"num_timesteps = 500 does not fit .*: expected 1000"):
        config.parse(data)
    data["diffusion"]["num_timesteps"] = 1000
    assert not config.parse(data).network({"num_classes": 3}).learn_sigma
    with pytest.raises(ConfigError, match="predicts a velocity and no sigma"):
        models.build(name, **{**SIZES, "learn_sigma": True})
